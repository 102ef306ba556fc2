"""The type of a written merge: the inputs' own, each number rounded once, and told; never a wrong sum behind a rounding."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from plait.adapters.arrays import all_finite, array_of
from plait.adapters.lora import Adapter, LoraFactors, concatenated
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.cli.merging import merge_text
from plait.disk.store import read_manifest
from plait.errors import RunError, UsageError
from plait.formats.reading import read_any
from plait.merging import Change, edit, merge_folders, merge_per_task, plan_merge
from plait.merging.folders import read_all
from plait.merging.light.exponents import Moves
from plait.merging.light.rounded_sums import rounded_sum
from plait.merging.light.sums import is_beside, probes_of, rounding, stored_sum, sum_error
from plait.merging.rounding import in_dtype
from plait.merging.verify import FAILED

HALVES = [torch.bfloat16, torch.float16]


def saved(folder, seed, dtype=torch.bfloat16, *, rank=4, scaling=2.0, size=1.0):
    g = torch.Generator().manual_seed(seed)
    modules = {
        f"layers.{i}.{t}": LoraFactors(
            torch.randn(rank, 48, generator=g).to(dtype), (size * torch.randn(40, rank, generator=g)).to(dtype), scaling
        )
        for i in range(2)
        for t in ("q", "v")
    }
    folder.mkdir(parents=True)
    write_adapter(folder, Adapter(folder.name, "base", modules, target_modules=("q", "v")))
    return folder


def relative(written, exact):
    """|D' - D| / |D| over all modules, from dense deltas."""
    pairs = [(f.delta(torch.float64), exact.modules[m].delta(torch.float64)) for m, f in written.modules.items()]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    return (off / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("dtype", HALVES)
def test_cat_copies_a_and_multiplies_b_by_powers_of_two_exactly(tmp_path, dtype):
    pair = [saved(tmp_path / "a", 0, dtype), saved(tmp_path / "b", 1, dtype, rank=6, scaling=0.5)]
    done = merge_folders(pair, tmp_path / "out", "cat", weights=[1.0, -4.0])
    a, b, out = (read_adapter(tmp_path / n) for n in ("a", "b", "out"))
    for m, f in out.modules.items():
        assert f.A.dtype == f.B.dtype == dtype and f.scaling == 1.0
        assert torch.equal(f.A, torch.cat([a.modules[m].A, b.modules[m].A]))
        assert torch.equal(f.B, torch.cat([2 * a.modules[m].B, -2 * b.modules[m].B], dim=1))
    kind = str(dtype).removeprefix("torch.")
    assert done.record.dtype == kind and done.record.rounding_error == 0.0 and done.record.verification_error < 1e-6
    assert "exact" in merge_text(done) and read_manifest(tmp_path / "out")["options"]["dtype"] == kind


@pytest.mark.parametrize("dtype", HALVES)
def test_a_sum_rounds_each_number_of_b_once_and_says_what_that_took(tmp_path, dtype):
    three = [saved(tmp_path / n, i, dtype) for i, n in enumerate("abc")]
    done = merge_folders(three, tmp_path / "out", "task_arithmetic", scale=0.3)
    wide = merge_folders(three, tmp_path / "wide", "task_arithmetic", scale=0.3, dtype="float32")
    out, exact = read_adapter(tmp_path / "out"), read_adapter(tmp_path / "wide")
    for m, f in out.modules.items():
        assert torch.equal(f.A.float(), exact.modules[m].A) and torch.equal(f.B, exact.modules[m].B.to(dtype))
    assert done.record.rounding_error == pytest.approx(relative(out, exact), rel=0.1)
    assert 0 < done.record.rounding_error < torch.finfo(dtype).eps / 2
    assert done.record.verification_error < 1e-6 and "--dtype float32" in merge_text(done)
    assert wide.record.dtype is None and wide.record.rounding_error is None
    assert "dtype" not in read_manifest(tmp_path / "wide")["options"]


@pytest.mark.parametrize("method", ["tsv", "ties", "knots", "svd", "task_arithmetic"])
def test_every_method_writes_what_it_computes_in_float32_rounded(tmp_path, method):
    three = [saved(tmp_path / n, i) for i, n in enumerate("abc")]
    done = merge_folders(three, tmp_path / "out", method, scale=0.7, rank=5)
    merge_folders(three, tmp_path / "wide", method, scale=0.7, rank=5, dtype="float32")
    out, exact = read_adapter(tmp_path / "out"), read_adapter(tmp_path / "wide")
    for m, f in out.modules.items():
        assert torch.equal(f.A, exact.modules[m].A.bfloat16()) and torch.equal(f.B, exact.modules[m].B.bfloat16())
    assert done.record.rounding_error == pytest.approx(
        relative(out, exact), rel=0.25
    )  # of four directions: 5 % off as a rule, of 24 such merges 18 at most
    assert done.record.verification_error <= FAILED


def test_types_that_differ_and_wider_ones_are_float32_and_a_type_may_be_asked_for(tmp_path):
    mixed = [saved(tmp_path / "a", 0), saved(tmp_path / "b", 1, torch.float16)]
    wide = [saved(tmp_path / "c", 2, torch.float32), saved(tmp_path / "d", 3, torch.float32)]
    for name, pair in (("mixed", mixed), ("wide", wide)):
        assert merge_folders(pair, tmp_path / name, "tsv").record.dtype is None
        assert {f.B.dtype for f in read_adapter(tmp_path / name).modules.values()} == {torch.float32}
    asked = merge_folders(wide, tmp_path / "asked", "cat", dtype="bfloat16")
    assert asked.record.dtype == "bfloat16" and asked.record.verification_error < 1e-6
    assert asked.record.rounding_error == pytest.approx(
        relative(read_adapter(tmp_path / "asked"), plan_merge(read_all(wide), "cat").run("x").adapter), rel=0.1
    )
    with pytest.raises(UsageError, match=r"unknown dtype 'bf16'.*did you mean"):
        merge_folders(wide, tmp_path / "no", "cat", dtype="bf16")


def test_one_adapter_keeps_its_bits_and_its_scaling_unless_a_type_is_asked_for(tmp_path):
    alone = saved(tmp_path / "a", 0, scaling=3.0)
    merge_folders([alone], tmp_path / "out", "cat")
    a, out = read_adapter(alone), read_adapter(tmp_path / "out")
    assert all(torch.equal(f.B, a.modules[m].B) and f.scaling == 3.0 for m, f in out.modules.items())
    merge_folders([alone], tmp_path / "wide", "cat", dtype="float32")
    assert {f.A.dtype for f in read_adapter(tmp_path / "wide").modules.values()} == {torch.float32}


def test_a_scaling_that_no_alpha_says_is_multiplied_in_before_the_one_rounding(tmp_path):
    one = read_adapter(saved(tmp_path / "a", 0, torch.float32))
    chosen = replace(one, modules={m: replace(f, scaling=0.7) for m, f in one.modules.items()})
    short, _ = in_dtype(chosen, "bfloat16", ())
    (tmp_path / "out").mkdir()
    write_adapter(tmp_path / "out", short)
    for m, f in read_adapter(tmp_path / "out").modules.items():
        assert torch.equal(f.B, (0.7 * one.modules[m].B).to(torch.bfloat16)) and f.scaling == 1.0


def test_what_is_too_large_for_the_type_is_an_error_and_leaves_nothing(tmp_path):
    pair = [saved(tmp_path / n, i, torch.float16, size=1000.0) for i, n in enumerate("ab")]
    for method in ("cat", "tsv"):
        with pytest.raises(RunError, match=r"overflows float16.*--dtype float32"):
            merge_folders(pair, tmp_path / "out", method, weights=[100.0, 1.0], scale=1e6)
        assert not (tmp_path / "out").exists()
    assert merge_folders(pair, tmp_path / "out", "cat", weights=[100.0, 1.0], dtype="float32").record.dtype is None


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_hides_no_wrong_sum(tmp_path, dtype):
    g = torch.Generator().manual_seed(0)
    made = [LoraFactors(torch.randn(4, 48, generator=g), torch.randn(40, 4, generator=g), 1.5) for _ in range(8)]
    parts = [(0.3, LoraFactors(f.A.to(dtype), f.B.to(dtype), f.scaling)) for f in made]
    whole = concatenated([f for _, f in parts], [c for c, _ in parts])
    short = replace(whole, A=whole.A.to(dtype), B=whole.B.to(dtype))
    assert sum_error(parts, short, probes_of(48, 0)) < 1e-6
    for wrong in (0.302, -0.3, 0.0):  # a weight that is off by less than bfloat16's step is seen too
        off = concatenated([f for _, f in parts], [wrong, *(c for c, _ in parts[1:])])
        merged = replace(off, A=off.A.to(dtype), B=off.B.to(dtype))
        assert sum_error(parts, merged, probes_of(48, 0)) > FAILED


def test_a_written_file_that_is_not_the_rounded_merge_is_refused(tmp_path, monkeypatch):
    from plait.merging.rounding import Rounding

    right = Rounding.stored
    monkeypatch.setattr(Rounding, "stored", lambda self, m, f: right(self, m, replace(f, B=f.B * 1.05)))
    pair = [saved(tmp_path / "a", 0), saved(tmp_path / "b", 1)]
    for method in ("cat", "tsv", "ties"):
        with pytest.raises(RunError, match="differs from the merge"):
            merge_folders(pair, tmp_path / "out", method)
        assert not (tmp_path / "out").exists()


def test_an_edited_merge_keeps_its_type_by_both_ways(tmp_path):
    a, b, c = (saved(tmp_path / n, i) for i, n in enumerate("abc"))
    merge_folders([a, b], tmp_path / "two", "cat")
    merge_folders([a, b, c], tmp_path / "three", "cat")
    wanted = read_adapter(tmp_path / "three")
    for by_difference in (False, True):
        out = tmp_path / f"by-{by_difference}"
        done = edit(tmp_path / "two", Change(add=(str(c),)), out, by_difference=by_difference)
        assert done.record.dtype == "bfloat16" and relative(read_adapter(out), wanted) < 1e-2
        back = tmp_path / f"back-{by_difference}"
        done = edit(out, Change(remove=("c",)), back, by_difference=by_difference)
        assert relative(read_adapter(back), read_adapter(tmp_path / "two")) < 1e-2 and done.record.rank == 8


def test_a_unified_adapter_keeps_the_type_and_its_masks_are_of_what_is_stored(tmp_path):
    three = [saved(tmp_path / n, i) for i, n in enumerate("abc")]
    done = merge_per_task(three, tmp_path / "out")
    assert done.record.dtype == "bfloat16" and all(0 < e < 1 for e in done.record.relative_error.values())
    assert {f.B.dtype for f in read_adapter(tmp_path / "out").modules.values()} == {torch.bfloat16}


def test_a_kohya_file_of_float16_stays_one(tmp_path):
    from safetensors.torch import save_file
    from tests.formats.conftest import factors_of, kohya_tensors

    files = []
    for seed in (1, 2):
        files.append(tmp_path / f"style{seed}.safetensors")
        save_file(kohya_tensors(factors_of(seed, dtype=torch.float16)), files[-1])
    done = merge_folders(files, tmp_path / "out.safetensors", "task_arithmetic", scale=0.3)
    out = read_any(tmp_path / "out.safetensors")
    exact = plan_merge(read_all(files), "task_arithmetic", scale=0.3).run("x").adapter
    assert {t.dtype for f in out.modules.values() for t in (f.A, f.B)} == {torch.float16}
    assert done.record.rounding_error == pytest.approx(relative(out, exact), rel=0.15)
    assert done.record.verification_error < 1e-6


@pytest.mark.parametrize("method", ["iso_c", "tsv"])
def test_a_written_lora_file_that_is_not_the_merge_is_refused(tmp_path, monkeypatch, method):
    from safetensors.torch import save_file
    from tests.formats.conftest import factors_of, kohya_tensors

    from plait.formats import writing

    files = [tmp_path / f"style{seed}.safetensors" for seed in (1, 2)]
    for seed, path in enumerate(files):
        save_file(kohya_tensors(factors_of(seed, dtype=torch.float16)), path)
    done = merge_folders(files, tmp_path / "right.safetensors", method)
    assert done.record.verification_error <= FAILED and done.seconds_merge > done.seconds_verify > 0
    right = writing.write_lora_file

    def wrong(path, adapter, *rest):
        off = {m: replace(f, B=(f.B.float() * 1.05).to(f.B.dtype)) for m, f in adapter.modules.items()}
        right(path, replace(adapter, modules=off), *rest)

    monkeypatch.setattr(writing, "write_lora_file", wrong)
    with pytest.raises(RunError, match="differs from the merge"):
        merge_folders(files, tmp_path / "out.safetensors", method)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("weights", [(0.5, -2.0, 4.0), (1.0, 1.0, 1.0), (-1.0, 1.0, 1.0), (1.0, 2.0, 512.0)])
@pytest.mark.parametrize("smallest", [1.0, 0.0, 1e-38, 1e38], ids=["normal", "zeros", "tiny", "huge"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_by_moved_exponents_has_the_bits_of_multiplied_floats(dtype, smallest, weights, monkeypatch):
    g = torch.Generator().manual_seed(5)
    kind, parts = getattr(torch, dtype), []
    for weight, rank in zip(weights, (11, 7, 9), strict=True):
        B = torch.randn(9001, rank, generator=g)
        B[17::1000] *= smallest if dtype == "bfloat16" else min(smallest, 1.0)
        parts.append((weight, LoraFactors(torch.randn(rank, 70, generator=g).to(kind), B.to(kind), 1.0)))
    probes = probes_of(70, 0)
    moved = rounded_sum(parts, dtype, probes)
    checked = is_beside(parts, moved.factors)
    monkeypatch.setattr(Moves, "of", lambda parts, dtype: None)
    multiplied = rounded_sum(parts, dtype, probes)
    assert moved.factors.A.data.tobytes() == multiplied.factors.A.data.tobytes()
    assert moved.factors.B.data.tobytes() == multiplied.factors.B.data.tobytes()
    assert (moved.finite, moved.fits) == (multiplied.finite, multiplied.fits)
    assert checked == is_beside(parts, moved.factors)
    error, size = moved.taken
    assert error == multiplied.taken[0] or not math.isfinite(multiplied.taken[1])
    assert (size() if callable(size) else size) == pytest.approx(multiplied.taken[1], rel=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    "factors", [(0.778,), (1.5,), (-0.0,), (3e-39, 1e20), (0.7, 1.5, -1 / 3), tuple(np.linspace(0.1, 1, 9))]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_is_multiplied_and_rounded_as_whole_factors_are(dtype, factors):
    """Halves between two numbers (1.5 gives some), signed zeros, numbers below the normal ones, overflow; few factors, and many."""
    kind, every = getattr(torch, dtype), torch.arange(1 << 16).to(torch.uint16).view(getattr(torch, dtype))
    B = every[every.isfinite()].reshape(-1, 8)
    order = torch.randperm(len(B), generator=torch.Generator().manual_seed(1))
    A = torch.ones(8, 20, dtype=kind)
    parts = [(float(c), LoraFactors(A, torch.roll(B[order], i), 1.0)) for i, c in enumerate(factors)]
    with np.errstate(over="ignore", invalid="ignore"):
        exact, stored = stored_sum(parts, dtype)
    total = rounded_sum(parts, dtype, probes_of(20, 0))
    assert np.array_equal(total.factors.B.data.view(np.uint16), stored.B.data.view(np.uint16))
    assert (total.finite, total.fits) == (all_finite(exact.B), all_finite(stored.B))
    assert is_beside(parts, total.factors)
    total.factors.B.data.view(np.uint16)[1000, -1] ^= 1
    assert not is_beside(parts, total.factors)


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_by_blocks_of_rows_has_the_bits_of_whole_factors(dtype, kept):
    """Of several blocks, ranks that differ, an input of another type, zeros and numbers below the type's normal ones."""
    g = torch.Generator().manual_seed(3)

    def part(rank, kind, scaling):
        B = torch.randn(4001, rank, generator=g)
        B[::3], B[1::3] = 0, B[1::3] * 1e-6
        return LoraFactors(torch.randn(rank, 700, generator=g).to(kind), B.to(kind), scaling)

    parts = [(0.3, part(11, kept, 2.0)), (-1.0, part(7, kept, 1.0)), (1.7, part(9, torch.bfloat16, 0.5))]
    probes = probes_of(700, 0)
    exact, stored = stored_sum(parts, dtype)
    by_blocks = rounded_sum(parts, dtype, probes)
    for one, other in ((by_blocks.factors.A, stored.A), (by_blocks.factors.B, stored.B)):
        assert one.dtype == other.dtype and one.data.tobytes() == other.data.tobytes()
    assert by_blocks.taken == rounding(exact, stored, probes)
    assert by_blocks.finite and by_blocks.fits and is_beside(parts, by_blocks.factors)
    by_blocks.factors.B.data[2000, 15] += 1
    assert not is_beside(parts, by_blocks.factors)
    assert not rounded_sum([(1e39, parts[0][1])], dtype, probes).finite
    large = rounded_sum([(1e6, parts[0][1])], dtype, probes)
    assert large.finite and large.fits == (dtype == "bfloat16")


@pytest.mark.parametrize("dtype", HALVES)
def test_every_pattern_of_16_bits_is_told_from_what_is_not_finite(dtype):
    every = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    numbers, others = every[every.isfinite()], every[~every.isfinite()]
    assert all_finite(array_of(numbers)) and all_finite(array_of(numbers[:0]))
    assert len(others) and not any(all_finite(array_of(torch.stack([numbers[0], one, numbers[-1]]))) for one in others)
