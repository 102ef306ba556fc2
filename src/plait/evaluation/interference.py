"""What statistics alone predict: how far an adapter moves each module's outputs on a task, without a forward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from plait.adapters.lora import LINEAR, Adapter
from plait.errors import InputError
from plait.statistics.moments import Statistics


def predicted_shift(adapter: Adapter, statistics: Statistics) -> dict[str, float]:
    """Relative output shift tr(D M D^T) / tr(W0 M W0^T) per module, D the module's delta, M the task's second moment.

    In factor form, with G = B^T B and K = A S A^T, both (r, r): tr(G K) over the output energy in the file. Nothing of
    size d x d is formed beyond the stored moments.

    Args:
        adapter: Any; its modules may carry the backbone's prefix.
        statistics: Statistics of the task the adapter is not to disturb (or of its own).

    Returns:
        Module -> shift, at least 0, for the linear modules the statistics know; NaN where the base's output is zero.

    Raises:
        InputError: No module in common, or different widths.

    Cost: r d^2 per module.
    """
    found: dict[str, float] = {}
    for module, factors in adapter.modules.items():
        moments = statistics.moments_for(module)
        if factors.kind != LINEAR or moments is None:
            continue
        info = statistics.modules[statistics.relative(module)]
        if factors.shape != info.shape:
            raise InputError(f"the adapter has {factors.shape}, the statistics {info.shape}", where=module)
        f = factors.folded(torch.float64 if factors.A.dtype == torch.float64 else torch.float32)
        moved = float(((f.B.T @ f.B).double() * moments.project(f.A).double()).sum())
        found[module] = max(0.0, moved) / info.output_energy if info.output_energy > 0 else math.nan
    if not found:
        raise InputError(
            f"adapter {adapter.name!r} and the statistics have no module in common", hint="of different bases?"
        )
    return found


def predicted_shifts(
    adapters: Mapping[str, Adapter], statistics: Mapping[str, Statistics]
) -> dict[str, dict[str, float]]:
    """Average `predicted_shift` over modules, for every adapter on every task.

    Args:
        adapters: Task -> its adapter.
        statistics: Task -> its statistics.

    Returns:
        Task of the adapter -> task of the inputs -> shift; NaN where no module has one.
    """

    def mean(shifts: Mapping[str, float]) -> float:
        values = [v for v in shifts.values() if math.isfinite(v)]
        return sum(values) / len(values) if values else math.nan

    return {i: {j: mean(predicted_shift(a, s)) for j, s in statistics.items()} for i, a in adapters.items()}
