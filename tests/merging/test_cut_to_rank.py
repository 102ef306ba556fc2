"""The cut of a dense delta keeps nearly what the best one of its rank would, and says what is lost."""

from __future__ import annotations

import pytest
import torch

from plait.adapters.lora import LoraFactors
from plait.merging import MergeInputs, merge_methods
from plait.merging.dense import DenseDelta, cut_to_rank

TASKS, RANK = 8, 8


def adapters(seed: int, out: int = 512, width: int = 512) -> list[LoraFactors]:
    """Random factors whose singular values fall as those of trained ones do."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.exp(-0.5 * torch.arange(RANK))
    return [
        LoraFactors(torch.randn(RANK, width, generator=g), torch.randn(out, RANK, generator=g) * sizes)
        for _ in range(TASKS)
    ]


def masked(method: str, given: list[LoraFactors], **options: float) -> DenseDelta:
    x = MergeInputs("layer.q", tuple("abcdefgh"), (1.0,) * TASKS, tuple(f.A for f in given), tuple(f.B for f in given))
    found = merge_methods()[method].function(x, **options)
    assert isinstance(found, DenseDelta)
    return found


def shares(delta: DenseDelta, factors: LoraFactors, rank: int) -> tuple[float, float]:
    """Energy kept of the whole, and of what the best cut keeps."""
    whole = delta.dense().double()
    energies = torch.linalg.svdvals(whole).square()
    left = (whole - factors.delta().double()).square().sum()
    kept = float(1 - left / energies.sum())
    return kept, kept * float(energies.sum() / energies[:rank].sum())


@pytest.mark.parametrize(("method", "rank", "least"), [
    ("ties", 64, 0.98), ("ties", 8, 0.995), ("dare_ties", 64, 0.94), ("dare_linear", 8, 0.98), ("dare_linear", 64, 0.94),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(512, 512), (768, 256), (256, 768)])
def test_a_cut_keeps_nearly_what_the_best_one_keeps(method, rank, least, shape):
    given = adapters(0, *shape)
    delta = masked(method, given)
    factors, lost = cut_to_rank(delta, rank, torch.Generator().manual_seed(0), near=given)
    kept, of_best = shares(delta, factors, rank)
    assert least <= of_best <= 1 + 1e-6
    assert kept == pytest.approx(1 - lost, abs=1e-5)
    blind, _ = cut_to_rank(delta, rank, torch.Generator().manual_seed(0))
    assert of_best >= shares(delta, blind, rank)[1] - 1e-3  # directions that are known are no worse than random ones


@pytest.mark.parametrize("near", ["none", "zero", "copies", "opposite"])
def test_directions_that_tell_little_do_no_harm(near):
    given = adapters(1)
    delta = masked("ties", given)
    one = given[0]
    known = {
        "none": [],
        "zero": [LoraFactors(one.A, torch.zeros_like(one.B))] * TASKS,
        "copies": [one] * TASKS,
        "opposite": [one, LoraFactors(one.A, -one.B)] * (TASKS // 2),
    }[near]
    for rank in (64, 8):
        factors, lost = cut_to_rank(delta, rank, torch.Generator().manual_seed(0), near=known)
        kept, of_best = shares(delta, factors, rank)
        assert of_best > 0.95 and kept == pytest.approx(1 - lost, abs=1e-5)


def test_a_delta_of_the_rank_is_kept_whole():
    given = adapters(2)
    whole = sum(f.delta() for f in given)
    delta = DenseDelta((512, 512), lambda start, stop: whole[start:stop])
    factors, lost = cut_to_rank(delta, TASKS * RANK, torch.Generator().manual_seed(0), near=given)
    assert lost < 1e-6 and float((factors.delta() - whole).norm()) < 1e-5 * float(whole.norm())
