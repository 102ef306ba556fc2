"""Formats into one another and back: the same update, the same bits where no scaling has to go elsewhere."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.errors import InputError, UsageError
from plait.formats.convert import convert
from plait.formats.reading import read_any
from tests.formats.conftest import KOHYA_NAMES, MODULES, factors_of


def same_bits(one, two):
    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys()
    assert [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kohya_through_peft_and_back_bit_by_bit(kohya, tmp_path, dtype):
    path = kohya("a", 1, alpha=2.0, dtype=dtype)
    found = convert(path, tmp_path / "peft", to="peft")
    assert found.record.folded == 0
    assert found.record.verification_error == 0.0
    convert(tmp_path / "peft", tmp_path / "again.safetensors", to="kohya")
    same_bits(path, tmp_path / "again.safetensors")


def test_kohya_through_diffusers_bit_by_bit_where_alpha_is_the_rank(kohya, tmp_path):
    path = kohya("a", 1, alpha=3.0, dtype=torch.float16)
    assert convert(path, tmp_path / "d.safetensors", to="diffusers").record.folded == 0
    convert(tmp_path / "d.safetensors", tmp_path / "again.safetensors", to="kohya")
    same_bits(path, tmp_path / "again.safetensors")


@pytest.mark.parametrize(("rank", "alpha", "dtype"), [(4, 2.0, torch.float16), (3, 1.0, torch.float32)])
def test_scalings_that_diffusers_cannot_hold_go_into_B(kohya, tmp_path, rank, alpha, dtype):
    path = kohya("a", 1, rank=rank, alpha=alpha, dtype=torch.float16)
    found = convert(path, tmp_path / "d.safetensors", to="diffusers")
    assert found.record.folded == len(MODULES)
    assert found.record.verification_error < (1e-12 if dtype == torch.float16 else 1e-7)
    stored = read_any(tmp_path / "d.safetensors")
    for module, (A, B, _) in factors_of(1, rank=rank, dtype=torch.float16).items():
        assert torch.equal(stored.modules[module].A, A.reshape(rank, -1))
        assert stored.modules[module].B.dtype == dtype
        torch.testing.assert_close(stored.modules[module].B.double(), B.reshape(-1, rank).double() * alpha / rank)


def test_a_peft_folder_needs_its_component(tmp_path):
    factors = {"conv_in": LoraFactors(torch.ones(2, 36), torch.ones(5, 2), 0.37, "conv:3x3")}
    (tmp_path / "one").mkdir()
    write_adapter(tmp_path / "one", Adapter("one", "some/base", factors))
    with pytest.raises(UsageError, match="which part of a pipeline"):
        convert(tmp_path / "one", tmp_path / "k.safetensors", to="kohya")
    with pytest.raises(InputError, match="'vae' is no component"):
        convert(tmp_path / "one", tmp_path / "k.safetensors", to="kohya", component="vae")
    convert(tmp_path / "one", tmp_path / "k.safetensors", to="kohya", component="unet")
    assert load_file(tmp_path / "k.safetensors")["lora_unet_conv_in.lora_down.weight"].shape == (2, 4, 3, 3)


def test_half_precision_alphas_that_peft_cannot_hold(kohya, tmp_path):
    path = kohya("a", 1, rank=3, alpha=0.3, dtype=torch.float16)
    found = convert(path, tmp_path / "peft")
    assert found.record.folded == len(MODULES)
    assert found.record.verification_error < 1e-7
    assert {f.B.dtype for f in read_adapter(tmp_path / "peft" / "unet").modules.values()} == {torch.float32}


def test_several_ranks_are_noted_for_diffusers(kohya, tmp_path):
    name = KOHYA_NAMES["unet.down_blocks.0.resnets.0.conv1"]
    wider = {f"{name}.lora_down.weight": torch.ones(5, 5, 3, 3), f"{name}.lora_up.weight": torch.ones(6, 5, 1, 1)}
    found = convert(kohya("a", changed=wider), tmp_path / "d.safetensors", to="diffusers")
    assert "several ranks" in found.record.notes[0]


def test_heads_stay_in_peft(tmp_path):
    head = {"classifier.weight": torch.ones(2, 4)}
    factors = {"q": LoraFactors(torch.ones(2, 4), torch.ones(4, 2))}
    (tmp_path / "one").mkdir()
    write_adapter(tmp_path / "one", Adapter("one", "b", factors, "SEQ_CLS", "bert", {"one": head}))
    with pytest.raises(InputError, match="heads or whole weights"):
        convert(tmp_path / "one", tmp_path / "k.safetensors", to="kohya", component="text_encoder")


def test_nothing_is_left_and_nothing_overwritten(kohya, tmp_path):
    path = kohya("a", changed={"lora_unet_mystery.lora_down.weight": torch.ones(3, 4)})
    with pytest.raises(InputError, match="has no up"):
        convert(path, tmp_path / "d.safetensors", to="diffusers")
    path = kohya("b")
    save_file({"x": torch.ones(1)}, tmp_path / "there.safetensors")
    with pytest.raises(UsageError, match="not written by plait"):
        convert(path, tmp_path / "there.safetensors", to="diffusers")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "there.safetensors"]
    assert not convert(path, tmp_path / "d.safetensors", to="diffusers").reused
    assert convert(path, tmp_path / "d.safetensors", to="diffusers").reused


def test_a_shorter_dtype_says_what_it_takes(kohya, tmp_path):
    path = kohya("a", 1, alpha=3.0)
    found = convert(path, tmp_path / "h.safetensors", to="kohya", dtype="float16")
    before, after = read_any(path).modules, read_any(tmp_path / "h.safetensors").modules
    error = sum((after[m].delta(torch.float64) - f.delta(torch.float64)).square().sum() for m, f in before.items())
    size = sum(f.norm_squared() for f in before.values())
    assert found.record.rounding_error == pytest.approx(float((error / size).sqrt()), rel=1e-6)
    assert 1e-5 < found.record.rounding_error < 1e-3
    assert {f.A.dtype for f in after.values()} == {torch.float16}
    huge = {f"{KOHYA_NAMES[next(iter(MODULES))]}.lora_up.weight": torch.full((12, 3), 1e6)}
    with pytest.raises(InputError, match="overflows float16"):
        convert(kohya("b", changed=huge), tmp_path / "b16.safetensors", to="kohya", dtype="float16")
    with pytest.raises(UsageError, match="unknown dtype"):
        convert(path, tmp_path / "x.safetensors", to="kohya", dtype="int8")
