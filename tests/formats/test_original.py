"""Transformers named with dots as their authors name them: the same update as kohya's file of the same layout."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.errors import InputError, UsageError
from plait.formats.convert import convert
from plait.formats.inspect import inspect
from plait.formats.reading import read_any
from plait.merging import merge_folders

W = 8
FLUX = {
    "double_blocks.3.img_attn.qkv": (3 * W, W),
    "double_blocks.3.txt_attn.proj": (W, W),
    "double_blocks.3.img_mlp.0": (4 * W, W),
    "single_blocks.7.linear1": (7 * W, W),
    "single_blocks.7.modulation.lin": (3 * W, W),
    "time_in.in_layer": (W, 5),
    "final_layer.adaLN_modulation.1": (2 * W, W),
}
SD3 = {
    "joint_blocks.2.x_block.attn.qkv": (3 * W, W),
    "joint_blocks.2.context_block.mlp.fc1": (4 * W, W),
    "x_embedder.proj": (W, 5),
}


@pytest.fixture
def written(tmp_path):
    """written("a", 0, FLUX, prefix) -> a dotted file, and kohya's of the same factors."""

    def make(name, seed, shapes=FLUX, prefix="", base="", **more):
        generator = torch.Generator().manual_seed(seed)
        dotted, kohya = {}, {}
        for module, (out, width) in shapes.items():
            A, B = torch.randn(4, width, generator=generator), torch.randn(out, 4, generator=generator)
            dotted |= {f"{prefix}{module}.lora_A.weight": A, f"{prefix}{module}.lora_B.weight": B}
            flat = "lora_unet_" + module.replace(".", "_")
            kohya |= {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B, f"{flat}.alpha": torch.tensor(4.0)}
        about = {"ss_base_model_version": base} if base else None
        save_file(dotted | more, tmp_path / f"{name}.safetensors", metadata=about)
        save_file(kohya, tmp_path / f"{name}-kohya.safetensors", metadata=about)
        return tmp_path / f"{name}.safetensors", tmp_path / f"{name}-kohya.safetensors"

    return make


PREFIXES = ["", "diffusion_model.", "model.diffusion_model.", "base_model.model."]


@pytest.mark.parametrize("shapes", [FLUX, SD3], ids=["flux", "sd3"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_same_as_kohyas_file(written, tmp_path, prefix, shapes):
    dotted, kohya = written("a", 0, shapes, prefix)
    assert inspect(dotted).facts.format == "original"
    convert(dotted, tmp_path / "k.safetensors", to="kohya")
    found, right = load_file(tmp_path / "k.safetensors"), load_file(kohya)
    assert found.keys() == right.keys() and all(torch.equal(found[k], right[k]) for k in right)
    for target, place in (("diffusers", "{}.safetensors"), ("peft", "{}")):
        files = [tmp_path / place.format(n + target) for n in ("mine", "theirs")]
        for source, file in zip((dotted, kohya), files, strict=True):
            convert(source, file, to=target)
        mine, theirs = (read_any(f if target == "diffusers" else f / "transformer") for f in files)
        assert mine.modules.keys() == theirs.modules.keys()
        assert all(torch.equal(f.delta(), theirs.modules[m].delta()) for m, f in mine.modules.items())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_merge_keeps_the_names(written, tmp_path, prefix):
    files = [written(n, i, prefix=prefix) for i, n in enumerate("ab")]
    out = tmp_path / "m.safetensors"
    found = merge_folders([str(d) for d, _ in files], out, "task_arithmetic", weights=[1.0, -0.5])
    assert found.record.verification_error < 1e-4 and found.record.format == "original"
    assert load_file(out).keys() == load_file(files[0][0]).keys()
    merged, (one, two) = read_any(out).modules, (read_any(d).modules for d, _ in files)
    for m, f in merged.items():
        torch.testing.assert_close(f.delta(), one[m].delta() - 0.5 * two[m].delta())
    merge_folders(
        [str(d) for d, _ in files], tmp_path / "d.safetensors", "task_arithmetic", format="diffusers", scale=1.0
    )
    apart = read_any(tmp_path / "d.safetensors").modules
    qkv = torch.cat([apart[f"transformer.transformer_blocks.3.attn.to_{x}"].delta() for x in "qkv"])
    sums = [
        m.delta() for m in (one[f"{prefix}double_blocks.3.img_attn.qkv"], two[f"{prefix}double_blocks.3.img_attn.qkv"])
    ]
    torch.testing.assert_close(qkv, sums[0] + sums[1])


def test_flux_2_is_not_taken_for_flux(written, tmp_path):
    """It shares Flux's names; its MLPs are gated, so that the fused layer of its single blocks is higher."""
    dotted, kohya = written("a", 0, {"double_blocks.0.img_attn.qkv": (3 * W, W)}, base="FLUX.2-dev")
    with pytest.raises(InputError, match="its layout is not known"):
        convert(kohya, tmp_path / "x.safetensors", to="diffusers")
    convert(dotted, tmp_path / "same.safetensors", to="original")
    wide = {"single_blocks.0.linear1": (9 * W, W)}
    for file in written("b", 0, wide):
        with pytest.raises(InputError, match="do not fill"):
            convert(file, tmp_path / "y.safetensors", to="diffusers")
    files = [str(written(n, i, wide)[0]) for i, n in enumerate("cd")]
    assert merge_folders(files, tmp_path / "m.safetensors", "tsv", scale=1.0).record.verification_error < 1e-4


def test_what_these_files_may_not_hold(written, tmp_path):
    biased, _ = written("a", 0, **{"double_blocks.3.img_attn.qkv.lora_B.bias": torch.ones(3 * W)})
    with pytest.raises(InputError, match="lora_bias"):
        read_any(biased)
    odd, _ = written("b", 0, FLUX | {"double_blocks.3.img_attn.q": (W, W)})
    with pytest.raises(InputError, match="is no layer of double_blocks"):
        convert(odd, tmp_path / "x.safetensors", to="kohya")
    with pytest.raises(UsageError, match="only merges of files with such names"):
        convert(written("c", 0)[1], tmp_path / "y.safetensors", to="original")
