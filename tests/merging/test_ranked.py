"""Magnitudes ranked row by row, as dropping by rank needs them: the order of a stable sort, whatever the numbers are."""

from __future__ import annotations

import numpy as np
import pytest

from plait.merging.methods.della import ascending


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_columns_inascending_order_the_first_of_equals_first(dtype):
    rng = np.random.default_rng(0)
    rows = np.abs(rng.standard_normal((5, 40))).astype(dtype) * np.logspace(-30, 30, 40, dtype=dtype)
    rows[0] = 0.0
    rows[1, ::2] = 2.0  # whose bits as an integer are the first above 2^30
    rows[2, 5], rows[2, 7], rows[3, 0] = np.finfo(np.float32).max, np.finfo(np.float32).tiny, 1e-45
    assert np.array_equal(ascending(rows), rows.argsort(axis=1, kind="stable"))
