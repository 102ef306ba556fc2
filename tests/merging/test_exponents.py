"""Factors put beside each other as bits: what multiplying in float32 and rounding gives, or nothing where that would round."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.adapters.lora import LoraFactors
from plait.merging.light import exponents
from plait.merging.light.exponents import Moves


def part(weight: float, rank: int = 3, dtype: torch.dtype = torch.bfloat16, scaling: float = 1.0, rows: int = 40):
    g = torch.Generator().manual_seed(rank)
    return weight, LoraFactors(torch.zeros(rank, 5), torch.randn(rows, rank, generator=g).to(dtype), scaling)


def of_exponents(*fields: int) -> LoraFactors:
    """One column of bfloat16 powers of two, by the bits of their exponents."""
    bits = np.array([e << 7 for e in fields], np.uint16)[:, None]
    return LoraFactors(torch.zeros(1, 5), torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), 1.0)


def multiplied(parts, dtype: torch.dtype) -> bytes:
    whole = torch.cat([weight * f.scaling * f.B.float() for weight, f in parts], 1).to(dtype)
    return whole.view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("ranks", [(3, 4), (4, 4)])  # of one width, rows are copied as one number each
@pytest.mark.parametrize("together", [1 << 16, 12, 1])  # all rows at once, a few, one by one
@pytest.mark.parametrize("weights", [(1.0, 0.5), (0.5, -2.0), (2.0, 1.0), (-1.0, 1.0), (256.0, 2.0**-9), (4.0,)])
def test_bits_are_those_of_the_product(weights, together, ranks, monkeypatch):
    monkeypatch.setattr(exponents, "_TOGETHER", together)
    parts = [part(w, rank, scaling=2.0 if i else 1.0) for i, (w, rank) in enumerate(zip(weights, ranks, strict=False))]
    parts[0][1].B[7:9], parts[0][1].B[9] = 0, -0.0
    moves = Moves.of(parts, "bfloat16")
    whole = moves.whole()
    assert (whole.dtype.name, whole.data.dtype) == ("bfloat16", np.uint16)
    assert whole.data.tobytes() == multiplied(parts, torch.bfloat16)
    some = np.empty((6, whole.data.shape[1]), np.uint16)
    assert moves.rows(5, 11, some) and some.tobytes() == whole.data[5:11].tobytes()
    assert moves.rows(40, 40, some[:0])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (-1.0, 1.0), (1.0,)])
def test_half_precision_moves_signs_alone(weights):
    parts = [part(w, rank, torch.float16) for w, rank in zip(weights, (3, 4), strict=False)]
    whole = Moves.of(parts, "float16").whole()
    assert (whole.dtype.name, whole.data.dtype) == ("float16", np.float16)
    assert whole.data.tobytes() == multiplied(parts, torch.float16)
    assert Moves.of([part(2.0, dtype=torch.float16)], "float16") is None


@pytest.mark.parametrize("factor", [0.75, 3.0, 512.0, 2.0**-9, 0.0, float("inf"), 1e39])
def test_other_factors_are_not_for_here(factor):
    assert Moves.of([part(1.0), part(factor)], "bfloat16") is None
    assert Moves.of([part(1.0), part(1.0, scaling=factor)], "bfloat16") is None


def test_other_types_are_not_for_here():
    assert Moves.of([part(1.0), part(1.0, dtype=torch.float16)], "bfloat16") is None
    assert Moves.of([part(1.0, dtype=torch.float32)], "float32") is None


@pytest.mark.parametrize(
    ("fields", "fits"),
    [((9, 246), True), ((0, 9, 246), True), ((8, 200), False), ((0, 8), False), ((20, 247), False), ((9, 255), False)],
)
@pytest.mark.parametrize("weight", [2.0**8, 2.0**-8, -0.5])
def test_numbers_next_to_the_ends_of_the_range_are_left(fields, fits, weight):
    """Whatever way exponents move: nine is the least that may go down by eight and stay normal, 246 the largest that may go up."""
    parts = [(weight, of_exponents(*fields))]
    whole = Moves.of(parts, "bfloat16").whole()
    assert (whole is not None) == fits
    if fits:
        assert whole.data.tobytes() == multiplied(parts, torch.bfloat16)


def test_a_number_that_is_too_small_beside_zeros_is_left_in_any_block(monkeypatch):
    monkeypatch.setattr(exponents, "_TOGETHER", 2)
    factors = of_exponents(*[100] * 6, 3)
    factors.B[1:3] = 0
    assert Moves.of([(0.5, factors)], "bfloat16").whole() is None
    assert Moves.of([(-1.0, factors)], "bfloat16").whole() is not None  # a sign is turned whatever the size
