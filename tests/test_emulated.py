"""Somebody with a CPU that has no bfloat16 instructions is told once, before hours are spent."""

from __future__ import annotations

import pytest
import torch

from plait.base import BaseModel, emulated


@pytest.mark.parametrize(
    ("level", "dtype", "told"),
    [
        ("AVX2", "bfloat16", True),
        ("AVX2", "float32", False),
        ("AVX512", "bfloat16", False),
        ("DEFAULT", "bfloat16", False),
    ],
)
def test_told_where_it_is_slow(monkeypatch, level, dtype, told):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    found = emulated(BaseModel("x", dtype=dtype, device="cpu"))
    assert (found is not None) == told
    assert not told or ("base.dtype=float32" in found and level in found)
