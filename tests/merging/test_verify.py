"""What verification by random directions sees, and what it does not take for an error."""

from __future__ import annotations

import pytest
import torch

from plait.adapters.lora import LoraFactors
from plait.merging.light.sums import probes_of, sum_error
from plait.merging.verify import FAILED


def factors(seed, out=24, width=40, rank=3, scaling=1.0):
    g = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(rank, width, generator=g), torch.randn(out, rank, generator=g), scaling)


def concatenated(parts):
    return LoraFactors(
        torch.cat([f.A for _, f in parts]), torch.cat([c * f.scaling * f.B for c, f in parts], dim=1), 1.0
    )


def error(parts, merged):
    return sum_error(parts, merged, probes_of(merged.shape[1], 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_sum_passes_and_one_wrong_number_does_not(dtype):
    parts = [(0.5, factors(0, scaling=2.0)), (-1.0, factors(1)), (0.25, factors(2, rank=5))]
    parts = [(c, LoraFactors(f.A.to(dtype), f.B.to(dtype), f.scaling)) for c, f in parts]
    merged = concatenated([(c, LoraFactors(f.A.float(), f.B.float(), f.scaling)) for c, f in parts])
    assert error(parts, merged) < 2e-6
    merged.B[3, 4] *= 1.5
    assert error(parts, merged) > FAILED


def test_a_sum_that_nearly_cancels_is_judged_in_float64():
    first = factors(0)
    nearly = LoraFactors(first.A, first.B * (1 + 2**-17))
    parts = [(1.0, first), (-1.0, nearly)]
    assert error(parts, concatenated(parts)) < 1e-10  # float64's rounding, 2**17 times


def test_nothing_equals_nothing_and_nothing_else():
    none = LoraFactors(torch.zeros(3, 40), torch.zeros(24, 3))
    assert error([(1.0, none)], none) == 0.0
    assert error([(1.0, none)], factors(0)) == 1.0
    assert error([(1.0, factors(0))], none) == 1.0
