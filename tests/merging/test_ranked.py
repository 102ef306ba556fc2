"""Dropping by rank: magnitudes ranked row by row as a stable sort does, and the window that its probabilities must fit in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import UsageError
from plait.merging import merge
from plait.merging.methods.della import ascending


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_columns_in_ascending_order_the_first_of_equals_first(dtype):
    rng = np.random.default_rng(0)
    rows = np.abs(rng.standard_normal((5, 40))).astype(dtype) * np.logspace(-30, 30, 40, dtype=dtype)
    rows[0] = 0.0
    rows[1, ::2] = 2.0  # whose bits as an integer are the first above 2^30
    rows[2, 5], rows[2, 7], rows[3, 0] = np.finfo(np.float32).max, np.finfo(np.float32).tiny, 1e-45
    assert np.array_equal(ascending(rows), rows.argsort(axis=1, kind="stable"))


@pytest.mark.parametrize(
    ("density", "epsilon", "fits"), [(0.9, 0.2, True), (0.95, 0.2, False), (0.15, 0.2, True), (0.1, 0.2, False)]
)
def test_the_window_of_probabilities_lies_within_zero_and_one(density, epsilon, fits):
    factors = {"q": LoraFactors(torch.ones(1, 4), torch.ones(3, 1), 1.0)}
    adapters = [Adapter(name, "base", factors) for name in "ab"]
    options = {"density": density, "epsilon": epsilon}
    if fits:
        assert merge(adapters, "della", options=options, scale=1.0).adapter.modules
    else:
        with pytest.raises(UsageError, match="outside"):
            merge(adapters, "della", options=options, scale=1.0)
