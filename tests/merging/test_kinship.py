"""Stages of one training are told in one line by every merge that adds them up, and adapters trained apart never are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tests.merging.test_bake import llama, lora
from tests.merging.test_light import run

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import write_adapter
from plait.choosing.notes import kin, kinship
from plait.disk.store import read_manifest
from plait.formats.writing import in_format, write_lora_file
from plait.merging import MergeRequest, MergeSpec, answer, merge_folders
from plait.merging.kinship import kin_lines

NAMES = [f"layers.{i}.{t}" for i in range(6) for t in ("q_proj", "v_proj")]


def adapter(name, seed, rank=4, dtype=torch.float32, out=40):
    g = torch.Generator().manual_seed(seed)
    factors = {
        m: LoraFactors(torch.randn(rank, 48, generator=g).to(dtype), torch.randn(out, rank, generator=g).to(dtype), 0.5)
        for m in NAMES
    }
    return Adapter(name, "base", factors, "CAUSAL_LM")


def later(stage, name, seed=9, step=0.2):
    """The same adapter after more training, which moves both factors a little."""
    g = torch.Generator().manual_seed(seed)
    moved = {
        m: replace(
            f,
            A=(f.A + step * torch.randn(f.A.shape, generator=g)).to(f.A.dtype),
            B=(f.B + step * torch.randn(f.B.shape, generator=g)).to(f.B.dtype),
        )
        for m, f in stage.modules.items()
    }
    return replace(stage, name=name, modules=moved)


def saved(folder, *adapters):
    for a in adapters:
        (folder / a.name).mkdir()
        write_adapter(folder / a.name, a)
    return [str(folder / a.name) for a in adapters]


@pytest.mark.parametrize("method", ["cat", "task_arithmetic", "linear", "tsv", "ties", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_merge_tells_stages_of_one_training(tmp_path, method, dtype):
    stages = [first := adapter("first", 0, dtype=dtype), later(first, "second"), adapter("apart", 1, dtype=dtype)]
    folders = saved(tmp_path, *stages)
    done = answer(MergeRequest(folders, tmp_path / "out", MergeSpec(method)))
    (line,) = done.record.beside
    assert line == kinship(kin(stages))[0] and line.startswith("first and second point much the same way (cosine 0.9")
    assert list(read_manifest(tmp_path / "out")["result"]["beside"]) == [line]
    assert not merge_folders([folders[0], folders[2]], tmp_path / "out2", method).record.beside


def test_a_sum_tells_them_without_torch(tmp_path):
    first, second = saved(tmp_path, a := adapter("first", 0), later(a, "second"))
    code, out, err = run("merge", first, second, "--method", "cat", "--out", tmp_path / "o")
    assert (code, err) == (0, "") and out.count("point much the same way") == 1
    code, out, err = run("merge", first, second, "--method", "cat", "--weights", "1,-1", "--out", tmp_path / "d")
    assert code == 0 and "same way" not in out


def test_lora_files_are_told_too(tmp_path):
    a = adapter("first", 0)
    for one in (a, later(a, "second")):
        named = replace(one, modules={f"unet.{m}": f for m, f in one.modules.items()}, task_type=None)
        write_lora_file(tmp_path / f"{one.name}.safetensors", in_format(named, "diffusers"), "diffusers", {})
    files = [str(tmp_path / f"{n}.safetensors") for n in ("first", "second")]
    for method in (None, "tsv"):
        done = answer(MergeRequest(files, tmp_path / f"{method}.safetensors", MergeSpec(method)))
        assert ["same way" in line for line in done.record.beside] == [True]


def test_many_stages_are_one_line():
    stages = [adapter("0", 0)]
    for i in range(1, 12):
        stages.append(later(stages[-1], str(i), seed=i, step=0.1))
    (line,) = kin_lines(stages, [1.0] * 12)
    assert "(so do 7 more pairs)" in line
    (line,) = kin_lines([*stages[:2], adapter("x", 3)], [1.0, 1.0, 1.0])
    assert line.startswith("0 and 1") and "more" not in line


def test_only_what_is_added_up_counts():
    a = adapter("a", 0)
    both = [a, later(a, "b")]
    assert kin_lines(both, [1.0, 0.5]) and kin_lines(both, [-1.0, -0.5])
    assert not kin_lines(both, [1.0, -1.0]) and not kin_lines(both, [1.0, 0.0])
    opposite = replace(a, name="c", modules={m: replace(f, B=-f.B) for m, f in a.modules.items()})
    assert not kin_lines([a, opposite], [1.0, 1.0])


@pytest.mark.parametrize("seed", range(8))
def test_adapters_that_share_half_of_what_they_are_are_no_kin(seed):
    """One A for all, as a common start leaves it; and one column of B for all, along which random directions alone would see kin."""
    g = torch.Generator().manual_seed(seed)
    A, b = {m: torch.randn(4, 48, generator=g) for m in NAMES}, torch.randn(40, 1, generator=g)
    by_A = [adapter(str(i), 10 * seed + i) for i in range(4)]
    by_A = [replace(a, modules={m: replace(f, A=A[m]) for m, f in a.modules.items()}) for a in by_A]
    by_B = [adapter(str(i), 10 * seed + i, rank=1) for i in range(4)]
    by_B = [replace(a, modules={m: replace(f, B=b) for m, f in a.modules.items()}) for a in by_B]
    for group in (by_A, by_B):
        assert kin_lines(group, [1.0] * 4) == []


def test_adapters_without_a_module_in_common_or_that_change_nothing_are_no_kin():
    a, b = adapter("a", 0), adapter("b", 0)
    still = replace(b, modules={m: replace(f, B=0 * f.B) for m, f in b.modules.items()})
    other = replace(b, modules={m.replace("layers", "blocks"): f for m, f in b.modules.items()})
    assert kin_lines([a, still], [1.0, 1.0]) == [] == kin_lines([a, other], [1.0, 1.0])
    assert kin_lines([a], [1.0]) == []


def test_the_command_prints_it_and_json_holds_it(tmp_path):
    first, second = saved(tmp_path, a := adapter("first", 0), later(a, "second"))
    code, out, _ = run("merge", first, second, "--method", "cat", "--json", "--out", tmp_path / "o")
    assert code == 0 and "same way" in json.loads(out)["beside"][0]


def test_a_baked_merge_tells_them(tmp_path):
    base = llama(tmp_path / "base")
    same = [lora(base, tmp_path / name, ["q_proj", "v_proj"], seed=1) for name in ("first", "second")]
    done = answer(MergeRequest([*map(str, same)], tmp_path / "out", MergeSpec("cat"), bake_into=base))
    assert [line for line in done.record.beside if "first and second point much the same way (cosine 1.00)" in line]
