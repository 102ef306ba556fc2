"""Means on the sphere of directions."""

from __future__ import annotations

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.merging import merge

ANGLES = (44.27, -64.93, -174.59, 119.54)  # degrees; their mean is the sum of what each turns from there
MEAN = 161.0725


def adapters(seed: int) -> list[Adapter]:
    """Four deltas in two dimensions, so that they depend on each other, of rank 3, with these directions."""
    g, made = torch.Generator().manual_seed(seed), []
    for i, angle in enumerate(torch.tensor(ANGLES, dtype=torch.float64).deg2rad()):
        A, B = torch.randn(3, 2, generator=g), torch.randn(1, 3, generator=g)
        x, y = (B @ A).double()[0]
        turn = angle - torch.atan2(y, x)
        turned = A.double() @ torch.tensor([[turn.cos(), turn.sin()], [-turn.sin(), turn.cos()]])
        made.append(Adapter(f"t{i}", "base", {"m": LoraFactors(turned.float(), B)}))
    return made


@pytest.mark.parametrize("steps", [5, 2000])
def test_karcher_stays_where_it_has_arrived(steps):
    """Held by coefficients over the deltas, it left again: what means nothing in them grew from step to step."""
    for seed in range(12):
        merged = merge(adapters(seed), "karcher", options={"steps": steps, "tolerance": 0.0}, scale=1.0)
        x, y = merged.adapter.modules["m"].delta()[0]
        assert float(torch.atan2(y, x).rad2deg()) == pytest.approx(MEAN, abs=1e-3), seed
