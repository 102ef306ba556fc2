"""Random masks for a GPU: drawn by several threads, eight tasks at once, and the same bits as entry by entry on a CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from plait.merging.entries import compiled, random_masks
from plait.merging.entries.random_masks import Drops, Place, bit_of, draw, fill_draws
from plait.merging.entries.streams import states_of
from plait.merging.inputs import MergeInputs, digest_of, digests_of
from plait.merging.methods.della import ascending, levels_of, mag_prune
from plait.merging.methods.sparse_arithmetic import sparse_arithmetic

SHAPE = (20, 70_001)  # three rows a block of draws, and a number of columns that no word of 64 bits divides
PLACE = Place("dense", SHAPE)


def module(tasks: int) -> MergeInputs:
    g = torch.Generator().manual_seed(3)
    ranks = [0 if t == 1 else 2 for t in range(tasks)]
    A = tuple(torch.randn(r, SHAPE[1], generator=g) for r in ranks)
    B = tuple(torch.randn(SHAPE[0], r, generator=g) for r in ranks)
    return MergeInputs("layer.q", tuple("abcdefghij"[:tasks]), (1.0,) * tasks, A, B, seed=7)


def test_streams_begin_where_numpys_do():
    seeds = [0, 1, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]
    seeds += np.random.default_rng(0).integers(0, 1 << 63, 50).tolist()
    for seed, state in zip(seeds, states_of(seeds), strict=True):
        assert np.array_equal(np.random.SFC64(seed).state["state"]["state"], state), seed


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("by_loops", [False, True])
@pytest.mark.parametrize(("start", "rows"), [(0, 20), (4, 11)], ids=["all rows", "from within a block"])
def test_bits_are_the_draws_below_the_level(start, rows, by_loops, threads, monkeypatch):
    if by_loops:
        pytest.importorskip("numba")
        monkeypatch.setattr(compiled, "_REPAID", 0)
    x, place = module(10), replace(PLACE, start=start)
    drops, out = Drops(x, 0.3), np.full((rows, SHAPE[1]), 255, np.uint8)
    for tasks in (slice(0, 8), slice(8, 10)):
        drops.fill(tasks, place, out, threads)
        assert not (out >> (tasks.stop - tasks.start)).any() or tasks.stop == 8
        for task in range(tasks.start, tasks.stop):
            wanted = draw(x, task, place, out.shape) < drops.level
            assert 0.29 < wanted.mean() < 0.31
            found = bit_of(torch.from_numpy(out), task - tasks.start).numpy()
            assert np.array_equal(found, wanted), task


@pytest.mark.parametrize("threads", [1, 3])
def test_draws_are_the_same_from_any_number_of_threads(threads):
    x, place, out = module(3), replace(PLACE, start=4), np.zeros((11, SHAPE[1]), np.uint16)
    fill_draws(x, 2, place, out, threads)
    assert np.array_equal(out, draw(x, 2, place, out.shape))


class OnGpu(torch.Tensor):
    """A tensor of this machine's memory that says it is a GPU's: what is done for one is then done here."""

    is_cuda = True  # type: ignore[assignment]


@pytest.fixture
def no_gpu_memory(monkeypatch):
    monkeypatch.setattr(random_masks, "_for_gpu", lambda part, dtype: torch.empty(part.shape, dtype=dtype))


def test_what_is_dropped_on_a_gpu_is_what_is_dropped_on_a_cpu(no_gpu_memory):
    x = module(10)
    there, here = Drops(x, 0.3), Drops(x, 0.3)
    for start, rows in ((0, 8), (8, 12)):
        place = replace(PLACE, start=start)
        for task in range(10):
            part = torch.randn(rows, SHAPE[1], generator=torch.Generator().manual_seed(task))
            left = there.drop(task, part.clone().as_subclass(OnGpu), place)
            assert torch.equal(left.as_subclass(torch.Tensor), here.drop(task, part.clone(), place))


@pytest.mark.parametrize("divided", [True, False])
def test_ranks_and_masks_of_a_gpu_are_those_of_a_cpu(divided, no_gpu_memory):
    x, part = module(3), torch.randn(20, SHAPE[1], generator=torch.Generator().manual_seed(1))
    part[:, ::3] = 0.5  # equals among the magnitudes
    part[:, 1::7] = -0.5
    there, here = (
        mag_prune(x, 2, p, PLACE, 0.5, 0.2, divided=divided) for p in (part.clone().as_subclass(OnGpu), part.clone())
    )
    assert torch.equal(there.as_subclass(torch.Tensor), here)
    assert 0.45 < float((here != 0).float().mean()) < 0.55
    steps = torch.arange(SHAPE[1], dtype=torch.int32)
    levels, order = levels_of(part, steps).numpy(), ascending(part.abs().numpy())
    assert np.array_equal(np.take_along_axis(levels, order, axis=1), np.broadcast_to(steps.numpy(), part.shape))


def test_factors_on_a_gpu_have_the_hashes_of_those_on_a_cpu():
    x = module(4)
    A, B = ([part.double().as_subclass(OnGpu) for part in parts] for parts in (x.A, x.B))
    B[2] = torch.stack([B[2], B[2]], dim=2)[..., 0].as_subclass(OnGpu)  # whose numbers do not lie side by side
    assert digests_of(A, B) == tuple(digest_of(a, b) for a, b in zip(x.A, x.B, strict=True)) == x.contents
    assert len(set(x.contents)) == 4


def test_random_drops_of_mergekits_methods_are_those_of_dare():
    x = module(3)
    found = sparse_arithmetic(x, drop="random", density=0.4).dense()
    drops = Drops(x, 0.4)
    wanted = sum(drops.drop(t, x.block(t, 0, SHAPE[0]), PLACE) for t in range(3))
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(wanted, sum(x.block(t, 0, SHAPE[0]) for t in range(3)))
