"""Blocks of rows and columns: they cover everything once, and nothing that is computed in them depends on how they lie."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from plait.merging import dense
from plait.merging.dense import DenseDelta
from plait.merging.entries import compiled, quantile, tiles
from plait.merging.entries.brackets import Bracket, Counting
from plait.merging.entries.largest_elected import largest_elected
from plait.merging.entries.quantile import thresholds_of
from plait.merging.entries.random_masks import Place, draw
from plait.merging.entries.tiles import Products, Spare
from plait.merging.inputs import MergeInputs
from plait.merging.registry import merge_methods

CPU = torch.device("cpu")
SHAPES = [(1, 1), (7, 300), (300, 7), (130, 1000), (1, 70000)]


def module(shape: tuple[int, int], ranks: tuple[int, ...] = (3, 3, 3)) -> MergeInputs:
    g = torch.Generator().manual_seed(5)
    A = tuple(torch.randn(r, shape[1], generator=g) for r in ranks)
    B = tuple(torch.randn(shape[0], r, generator=g) for r in ranks)
    return MergeInputs("layer.q", tuple("abcdefghi")[: len(ranks)], (1.0, 1.0, 0.5) * (len(ranks) // 3), A, B)


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks of draws and tiles so small that small matrices have many of both."""
    monkeypatch.setattr(dense, "_ON_CPU", 128)
    monkeypatch.setattr(tiles, "_ROWS", 4)


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_entry_is_in_one_tile(shape, whole_rows, small_tiles):
    for start, stop in {(0, shape[0]), (shape[0] // 3, shape[0] // 2), (0, 1)}:
        seen = np.zeros(shape, dtype=int)
        for tile in tiles.tiles(shape, CPU, whole_rows=whole_rows, start=start, stop=stop):
            assert tile.shape == seen[tile.top : tile.bottom, tile.left : tile.right].shape
            assert not whole_rows or tile.shape[1] == shape[1]
            seen[tile.top : tile.bottom, tile.left : tile.right] += 1
        assert (seen[start:stop] == 1).all() and seen.sum() == (stop - start) * shape[1]


@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 0, 5), (1,) * 9, (1, 2) * 5])
def test_parts_are_the_products(ranks, small_tiles):
    x = module((40, 90), ranks)
    products, spare = Products.of(x.B, x.A), Spare()
    assert (products.stacked is not None) == (len(set(ranks)) == 1)
    for tile in products.tiles(whole_rows=False):
        parts = list(products.parts(tile, spare))  # all of them at once: none overwrites another
        for part, b, a in zip(parts, x.B, x.A, strict=True):
            wanted = b[tile.top : tile.bottom].double() @ a[:, tile.left : tile.right].double()
            torch.testing.assert_close(part.double(), wanted, atol=1e-5, rtol=1e-5)


def test_draws_are_those_of_whole_rows(small_tiles, monkeypatch):
    monkeypatch.setattr(dense, "BLOCK", 900)
    x, shape = module((40, 90)), (40, 90)
    whole = draw(x, 1, Place("dense", shape), shape)
    place = Place("dense", shape)
    for tile in tiles.tiles(shape, CPU, whole_rows=False):
        here = Place("dense", shape, tile.top, tile.left, place.drawn)
        assert np.array_equal(draw(x, 1, here, tile.shape), whole[tile.top : tile.bottom, tile.left : tile.right])


@pytest.mark.parametrize("shape", [(60, 90), (400, 500), (6, 5)])  # 0.4 of 6 x 5 is 12, and 0.4 x 6 x 5 a little more
@pytest.mark.parametrize("density", [0.001, 0.3, 0.4, 1.0])
@pytest.mark.parametrize("tasks", [3, 9])
@pytest.mark.parametrize("most", [1 << 25, 0], ids=["of whole parts", "by a bracket"])
def test_thresholds_are_those_of_a_sort(shape, density, tasks, most, monkeypatch):
    monkeypatch.setattr(quantile, "WHOLE", most)
    x = module(shape, (3,) * tasks)
    products, spare = Products.of(x.B, x.A), Spare()
    whole = torch.zeros(tasks, *shape)
    for tile in products.tiles(whole_rows=False):
        for t, part in enumerate(products.parts(tile, spare)):
            whole[t, tile.top : tile.bottom, tile.left : tile.right] = part
    for bound, part in zip(thresholds_of(products, density), whole, strict=True):
        largest = part.abs().flatten().sort(descending=True).values
        assert float(bound) == (0.0 if density == 1 else float(largest[math.ceil(density * part.numel()) - 1]))


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "breadcrumbs", "emr", "sce", "della"])
def test_results_lie_in_memory_of_their_own_and_do_not_depend_on_the_tiles(method, monkeypatch):
    function = merge_methods()[method].function
    delta = function(module((130, 200)))
    assert isinstance(delta, DenseDelta)
    whole = delta.dense()
    first, rest = delta.rows(0, 64), delta.rows(64, 130)
    assert first.data_ptr() != rest.data_ptr()
    torch.testing.assert_close(torch.cat([first, rest]), whole, atol=1e-6, rtol=1e-5)
    assert float(delta.energy()) == pytest.approx(float(whole.double().square().sum()), rel=1e-6)
    monkeypatch.setattr(dense, "_ON_CPU", 128)
    monkeypatch.setattr(tiles, "_ROWS", 4)
    again = function(module((130, 200)))
    assert isinstance(again, DenseDelta)
    torch.testing.assert_close(again.dense(), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("count", [11, 5])
@pytest.mark.parametrize("weights", [(1.0,) * 11, tuple(0.5 + 0.3 * t * (-1) ** t for t in range(11))])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {}),
        ("ties", {"agreeing": "sum", "scope": "module"}),
        ("ties", {"density": 1.0}),
        ("ties", {"space": "core"}),
        ("dare_ties", {"density": 0.3}),
        ("dare_ties", {"density": 1.0}),
    ],
)
def test_compiled_loops_give_the_same_bits(method, options, weights, count, monkeypatch):
    """Of two groups of tasks or one, one of which does not adapt the module; entries that cancel exactly and zeros among them."""
    pytest.importorskip("numba")
    weights = weights[:count]
    x = module((130, 700) if count > 8 else (3, 33000), ((3,) * 4 + (0,) + (3,) * 6)[:count])
    B = list(x.B)
    B[1], B[2] = B[0] * -weights[0] / weights[1], B[2] * (torch.arange(len(B[2]))[:, None] % 2)
    A = list(x.A)
    A[1] = A[0]
    x = replace(x, tasks=tuple("abcdefghijk"[:count]), weights=weights, A=tuple(A), B=tuple(B))

    def merged() -> torch.Tensor:
        delta = merge_methods()[method].function(replace(x), **options)
        return delta.dense() if isinstance(delta, DenseDelta) else delta.folded(torch.float32).A

    passes = merged()
    monkeypatch.setattr(compiled, "_REPAID", 0)
    assert compiled.loops_for(1) is not None
    assert torch.equal(merged().view(torch.int32), passes.view(torch.int32))


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("count", [3, 9], ids=["of one group", "of two"])
def test_parts_made_once_give_the_bits_of_two_passes(count, density, monkeypatch):
    pytest.importorskip("numba")
    x = module((130, 700), (3,) * count)
    weights = tuple(0.5 - t for t in range(len(x.A)))
    # Of numbers of few bits: products are exact, so they are the same whichever kernel a processor takes for blocks of this size.
    products = Products.of([(b * 16).round() / 16 for b in x.B], [(a * 16).round() / 16 for a in x.A])
    passes = largest_elected(products, density, weights, 1)
    monkeypatch.setattr(compiled, "_REPAID", 0)
    tiled = largest_elected(replace(products, stacked=None), density, weights, 1)
    once = largest_elected(products, density, weights, 1)
    assert bool(once.any()) and (density == 1 or not bool(once.all()))
    assert torch.equal(once, tiled) and torch.equal(once, passes)


def test_what_threads_hold_back_is_handed_over(monkeypatch):
    """Brackets that hold everything: what waits is more than there is a place for, and the rest is asked for."""
    pytest.importorskip("numba")
    monkeypatch.setattr(compiled, "_REPAID", 0)
    blocks = torch.randn(7, 2, 33, 41, generator=torch.Generator().manual_seed(2))
    brackets = {g: Bracket(torch.rand(100), 7 * 33 * 41, 50, widening=1e3) for g in (3, 4)}
    counting = Counting(brackets, 5)
    for block in blocks:
        counting.take(3, block.clone(), Spare())
    assert brackets[3].held == 6 * 33 * 41
    counting.rest()
    for g, bracket in brackets.items():
        assert bracket.above == 0 and bracket.held == 7 * 33 * 41
        wanted = blocks[:, g - 3].abs().flatten().sort().values
        assert torch.equal(torch.from_numpy(bracket.inside[: bracket.held]).sort().values, wanted)


def test_without_numba_passes_do_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled._loops.cache_clear()
    try:
        assert compiled.loops_for(1 << 40) is None
    finally:
        compiled._loops.cache_clear()


def test_loops_are_compiled_where_no_cache_can_be_written(monkeypatch):
    numba = pytest.importorskip("numba")
    njit = numba.njit

    def without_place(**options: object) -> object:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", without_place)
    compiled._loops.cache_clear()
    try:
        assert compiled.loops_for(1 << 40) is not None
    finally:
        compiled._loops.cache_clear()
