"""Mixtures of experts, baked: the model on disk says what PEFT's merge_and_unload says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.merging.test_mixtures import MODELS, targets
from tests.mixtures import FUSED, adapter, difference, loaded, logits, mixture

from plait.errors import InputError
from plait.merging import plan_merge
from plait.merging.bake.baking import bake
from plait.merging.folders import read_all
from plait.model.stored import base_tensors


def reloaded(folder: Path) -> torch.Tensor:
    import transformers as hf

    return logits(hf.AutoModelForCausalLM.from_pretrained(folder))


def saved(name: str, folder: Path, *, fused: bool, **changed: int) -> Path:
    model = mixture(name, **changed)
    model.save_pretrained(folder, save_original_format=not fused)
    assert any(".experts.0." in n for n in base_tensors(folder)) is (not fused and name != "gpt_oss")
    return folder


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_one_and_two_adapters(tmp_path, name, fused):
    base = saved(name, tmp_path / "base", fused=fused)
    a, b = (adapter(mixture(name), tmp_path / n, s, **targets(name)) for n, s in (("a", 1), ("b", 2)))
    for given in ([a], [a, b]):
        done = bake(plan_merge(read_all(given), "task_arithmetic", scale=1.0), base, tmp_path / "baked", overwrite=True)
        assert done.record.verification_error < 1e-6
        assert difference(reloaded(tmp_path / "baked"), logits(loaded(mixture(name), *given))) < 1e-5


@pytest.mark.parametrize("method", ["ties", "dare_linear", "tsv"])
def test_merges_that_are_no_sums_are_baked_as_they_are_written(tmp_path, method):
    from plait.merging.folders import merge_folders

    base = saved("mixtral", tmp_path / "base", fused=False)
    a, b = (adapter(mixture("mixtral"), tmp_path / n, s) for n, s in (("a", 1), ("b", 2)))
    plan = plan_merge(read_all([a, b]), method, rank=16, scale=1.0)
    bake(plan, base, tmp_path / "baked")
    merge_folders([a, b], tmp_path / "m", method=method, rank=16, scale=1.0)
    assert difference(reloaded(tmp_path / "baked"), logits(loaded(mixture("mixtral"), tmp_path / "m"))) < 1e-5


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_square_experts_are_turned_as_the_model_has_them(tmp_path, name):
    """hidden = 2 * inner for one matrix, hidden = inner for the other: shapes do not tell the orientation."""
    for inner in (8, 16):
        sizes = {"intermediate_size": inner} if name == "gpt_oss" else {"moe_intermediate_size": inner}
        base = saved(name, tmp_path / f"base{inner}", fused=True, **sizes)
        given = adapter(
            mixture(name, **sizes), tmp_path / f"a{inner}", 1, target_modules=["q_proj"], target_parameters=FUSED
        )
        bake(plan_merge(read_all([given]), "task_arithmetic", scale=1.0), base, tmp_path / f"baked{inner}")
        wanted = logits(loaded(mixture(name, **sizes), given))
        assert difference(reloaded(tmp_path / f"baked{inner}"), wanted) < 1e-5


def test_half_precision_and_shards(tmp_path):
    import transformers as hf

    model = mixture("mixtral").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    a = adapter(mixture("mixtral"), tmp_path / "a", 1)
    done = bake(plan_merge(read_all([a]), "task_arithmetic", scale=1.0), tmp_path / "base", tmp_path / "baked")
    assert done.record.dtype == ("BF16",) and 0 < done.record.rounding_error < 0.02
    rounded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    wanted = loaded(rounded, a)
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype=torch.float32)
    for (name, x), y in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(x, y.to(torch.bfloat16).float(), atol=1e-2, rtol=1e-2, msg=name)


def test_other_bases_are_refused_by_name(tmp_path):
    a = adapter(mixture("mixtral"), tmp_path / "a", 1)
    fewer = saved("mixtral", tmp_path / "fewer", fused=False, num_local_experts=3)
    with pytest.raises(InputError, match=r"no expert 3|update \(4, 16\)"):
        bake(plan_merge(read_all([a]), "task_arithmetic", scale=1.0), fewer, tmp_path / "baked")
    wider = saved("mixtral", tmp_path / "wider", fused=False, intermediate_size=32)
    with pytest.raises(InputError, match="has an update"):
        bake(plan_merge(read_all([a]), "task_arithmetic", scale=1.0), wider, tmp_path / "baked")
    other = saved("gpt_oss", tmp_path / "other", fused=False)
    with pytest.raises(InputError):
        bake(plan_merge(read_all([a]), "task_arithmetic", scale=1.0), other, tmp_path / "baked")
    assert not (tmp_path / "baked").exists()
