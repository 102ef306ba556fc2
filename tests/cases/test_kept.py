"""Shared cases that always gave what is right: they still do, recomputed from the files or by PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cases.conftest import deltas, far, loaded, logits

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*embedding.*", "ignore:.*tie.*", "ignore:.*config file.*", "ignore:Adapter 'default'"
)


def of_file(path: str) -> dict[str, torch.Tensor]:
    """Module -> update in float64, of a kohya or diffusers file: alpha / rank, or 1 where there is none."""
    tensors, found = load_file(path), {}
    for a, b in ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")):
        for key in [k for k in tensors if k.endswith(a)]:
            module = key.removesuffix(a)
            A, B = tensors[key].double(), tensors[module + b].double()
            alpha = tensors.get(f"{module}.alpha")
            found[module] = (float(alpha) / A.shape[0] if alpha is not None else 1.0) * B.flatten(1) @ A.flatten(1)
    return found


def test_multihead_attention(case, plait):
    case("14_multihead_attention")
    assert plait("merge in/a in/b --out m")[0] == 0
    a, b, found = (deltas(Path(f)) for f in ("in/a", "in/b", "m"))
    for module, delta in found.items():
        wanted = a.get(module, 0) + b.get(module, 0)
        assert float((delta - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("pattern", [{"alpha": {"attn": 5}}, {"alpha": {"out_proj": 5}}, {"rank": {"attn": 6}}])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.filterwarnings("ignore:.*did not match any.*")
def test_an_attention_has_one_rank_and_alpha_for_both_its_layers(pattern, rslora, plait, tmp_path):
    """PEFT looks them up by the attention's name, whatever a pattern says of the output layer inside it."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(16, 2), "fc": torch.nn.Linear(16, 16)})

    def after(*folders: str) -> dict[str, torch.Tensor]:
        model = net()
        for folder in folders:
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        return model.state_dict()

    patterns = {f"{k}_pattern": v for k, v in pattern.items()}
    for name, options in (("a", patterns), ("b", {})):
        torch.manual_seed(ord(name))
        config = LoraConfig(target_modules=["attn", "fc"], init_lora_weights=False, use_rslora=rslora, **options)
        get_peft_model(net(), config).save_pretrained(tmp_path / name)
    assert "ok" in plait("check a")[1]
    code, _, err = plait("merge a b --out m")
    assert code == 0, err
    zero, wanted, found = net().state_dict(), after("a", "b"), after("m")
    for weight in ("attn.in_proj_weight", "attn.out_proj.weight", "fc.weight"):
        assert float((found[weight] - wanted[weight]).norm() / (wanted[weight] - zero[weight]).norm()) < 1e-6


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("keep", 1e-3)])  # some are float16, which is kept
@pytest.mark.parametrize(
    ("name", "files", "weights"),
    [
        ("18_mixed_ranks_no_alpha", ["turbo", "style"], [1.0, 1.0]),
        ("19_different_dims_kohya", ["dim32", "dim8", "blocks", "text_only"], [1.0, 0.5, -0.7, 1.0]),
    ],
)
def test_files_of_different_ranks(name, files, weights, dtype, error, case, plait):
    case(name)
    named = " ".join(f"in/{f}.safetensors" for f in files)
    code, _, err = plait(f"merge {named} --weights {','.join(map(str, weights))} --dtype {dtype} --out m.safetensors")
    assert code == 0, err
    inputs, found = [of_file(f"in/{f}.safetensors") for f in files], of_file("m.safetensors")
    assert found.keys() == {m for one in inputs for m in one}
    for module, delta in found.items():
        wanted = sum(w * one[module] for w, one in zip(weights, inputs, strict=True) if module in one)
        assert float((delta - wanted).norm() / wanted.norm()) < error


@pytest.mark.parametrize("name", ["head", "both"])
def test_an_output_layer_tied_to_the_embedding(name, case, plait):
    from transformers import AutoModelForCausalLM

    case("23_lm_head_tied_bake")
    base = AutoModelForCausalLM.from_pretrained("in/base").eval()
    wanted, zero = torch.load("in/logits.pt")[name], logits(base)
    assert plait(f"merge in/{name} --bake in/base --out b")[0] == 0 and plait(f"merge in/{name} --out m")[0] == 0
    assert far(logits(AutoModelForCausalLM.from_pretrained("b").eval()), wanted, zero) < 1e-5
    assert far(logits(loaded("m", base)), wanted, zero) < 1e-5
