"""The algebra of factors: exact sums, best truncation, norms; from the smallest tensors on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.adapters.lora import LoraFactors, concatenated, truncated
from plait.errors import InputError

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4))


def factors(n_out: int, n_in: int, rank: int, seed: int, scaling: float = 1.0, dtype=torch.float64) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, n_in, generator=generator, dtype=torch.float64)
    B = torch.randn(n_out, rank, generator=generator, dtype=torch.float64)
    return LoraFactors(A.to(dtype), B.to(dtype), scaling)


@given(SIZES, st.floats(0.01, 100), st.integers(0, 99))
def test_folding_keeps_the_delta(size, scaling, seed):
    f = factors(*size, seed, scaling)
    expected = scaling * (f.B @ f.A)
    torch.testing.assert_close(f.delta(torch.float64), expected)
    torch.testing.assert_close(f.folded(torch.float64).delta(torch.float64), expected)
    assert f.folded().scaling == 1.0 and f.folded().A.dtype == torch.float32
    assert f.norm_squared() == pytest.approx(float(expected.square().sum()), rel=1e-9)


@given(SIZES, st.lists(st.floats(-3, 3), min_size=1, max_size=4))
def test_concatenation_is_the_weighted_sum(size, weights):
    n_out, n_in, rank = size
    parts = [factors(n_out, n_in, 1 + (rank + i) % 4, i, 0.5 + i) for i in range(len(weights))]
    found = concatenated(parts, weights, torch.float64)
    expected = sum(w * p.delta(torch.float64) for w, p in zip(weights, parts, strict=True))
    torch.testing.assert_close(found.delta(torch.float64), expected)
    assert found.rank == sum(p.rank for p in parts)


@settings(deadline=None)
@given(SIZES, st.integers(1, 5), st.integers(0, 99))
def test_truncation_is_the_best_of_its_rank(size, rank, seed):
    f = factors(*size, seed, 2.0)
    cut, lost = truncated(f, rank)
    spectrum = torch.linalg.svdvals(f.delta(torch.float64)).square()
    assert lost == pytest.approx(float(spectrum[rank:].sum() / spectrum.sum()) if rank < f.rank else 0.0, abs=1e-12)
    left = f.delta(torch.float64) - cut.delta(torch.float64)
    assert float(left.square().sum()) == pytest.approx(lost * float(spectrum.sum()), abs=1e-9)
    assert cut.rank == min(rank, f.rank) or rank >= f.rank or cut.rank <= min(size)


def test_a_zero_delta_loses_nothing():
    cut, lost = truncated(LoraFactors(torch.ones(3, 4), torch.zeros(5, 3)), 1)
    assert lost == 0.0 and not cut.delta().any()


@pytest.mark.parametrize(("a", "b"), [((2, 3), (4, 1)), ((2,), (4, 2)), ((2, 3, 1), (4, 2))])
def test_factors_that_do_not_fit(a, b):
    with pytest.raises(InputError, match="not \\(rank, in\\) and \\(out, rank\\)"):
        LoraFactors(torch.zeros(a), torch.zeros(b))
