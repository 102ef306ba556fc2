"""Bakes and conversions into bases whose files name modules as an older transformers did, as those of ViT on the hub do, against PEFT."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from plait.adapters.peft_format import read_adapter
from plait.checking.on_base import compare_on_base
from plait.errors import InputError
from plait.formats.convert import convert
from plait.formats.plain import Means
from plait.merging.bake.baking import bake

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16, "patch_size": 8,
}  # fmt: skip
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit(path: Path, kind: str = "Model") -> Path:
    import transformers as hf

    torch.manual_seed(0)
    getattr(hf, f"ViT{kind}")(hf.ViTConfig(**SIZES)).save_pretrained(path)
    return path


def trained(base: Path, path: Path, **lora) -> torch.Tensor:
    """Saves an adapter with transformers' own names of today, and gives what PEFT makes of it."""
    import transformers as hf

    model = hf.AutoModel.from_pretrained(base).eval()
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **lora)).eval()
    model.save_pretrained(path)
    with torch.no_grad():
        return model(IMAGES).last_hidden_state


def output(folder: Path) -> torch.Tensor:
    import transformers as hf

    with torch.no_grad():
        return hf.AutoModel.from_pretrained(folder).eval()(IMAGES).last_hidden_state


def test_an_adapter_goes_into_files_of_older_names(tmp_path):
    base = vit(tmp_path / "base")
    wanted = trained(base, tmp_path / "a", target_modules=["q_proj", "fc1"])
    bake(read_adapter(tmp_path / "a"), base, tmp_path / "out")
    assert (output(tmp_path / "out") - wanted).abs().max() < 1e-5 < (output(base) - wanted).abs().max()


def test_a_conversion_by_a_base_of_older_names(tmp_path):
    base = vit(tmp_path / "base")
    wanted = trained(base, tmp_path / "a", target_modules=["q_proj", "fc1"], use_dora=True)
    convert(tmp_path / "a", tmp_path / "plain", means=Means(base=base, rank=32))
    bake(read_adapter(tmp_path / "plain"), base, tmp_path / "out")
    assert (output(tmp_path / "out") - wanted).abs().max() < 1e-5


def test_names_that_no_version_has_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    base = vit(tmp_path / "base")
    trained(base, tmp_path / "a", target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({n.replace("q_proj", "other"): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace("q_proj", "other"))
    with pytest.raises(InputError, match="the base holds no weight for module"):
        bake(read_adapter(tmp_path / "a"), base, tmp_path / "out")


@pytest.mark.parametrize("kind", ["Model", "ForImageClassification"])
def test_check_asks_a_model_of_images(tmp_path, kind):
    import transformers as hf

    base = vit(tmp_path / "base", kind)
    model = getattr(hf, f"ViT{kind}").from_pretrained(base)
    peft.get_peft_model(
        model, peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    ).save_pretrained(tmp_path / "a")
    found = compare_on_base(tmp_path / "a", str(base))
    assert not found.faults and found.effect > 0 and found.model == f"ViT{kind}"
