"""Whether a merge is cut in the metric of its tasks' inputs, and the second moment that this metric is, module by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import Adapter, LoraFactors, truncated
from plait.merging.dense import DenseDelta
from plait.merging.metric import cut_dense, cut_factors
from plait.merging.record import IN_THE_METRIC

if TYPE_CHECKING:
    from plait.statistics.moments import Moments


@dataclass(frozen=True, slots=True)
class InputMetric:
    """What the tasks feed into every module of a merge; every task counts alike, however many its tokens.

    Args:
        statistics: The second moments of each task that counts, in the order of the adapters.
    """

    statistics: tuple[Any, ...]

    def of(self, module: str) -> Float[Tensor, "in in"] | None:
        """S = sum_t S_t / tr S_t in float64; None where nothing but zeros comes in, so that any cut serves.

        Cost: one (in, in) matrix.
        """
        total: Tensor | None = None
        for statistics in self.statistics:
            moments: Moments | None = statistics.moments_for(module)
            if moments is not None and moments.trace > 0:
                one = moments.normalised(torch.float64)
                total = one if total is None else total + one
        return total

    def cut(
        self, module: str, delta: LoraFactors | DenseDelta, rank: int, device: torch.device | str = "cpu"
    ) -> tuple[LoraFactors, float] | None:
        """Cut one module's update to a rank; None where nothing comes in, or there is nothing to cut.

        Returns:
            The factors, and the share of tr(D S D^T) that is lost.
        """
        shortest = min(delta.shape) if isinstance(delta, DenseDelta) else delta.rank
        S = self.of(module) if rank < shortest else None
        if S is None:
            return None
        S = S.to(device)
        if isinstance(delta, DenseDelta):
            return cut_dense(delta.dense().double(), S, rank)
        return cut_factors(delta, S, rank)

    def energy(self, module: str, factors: LoraFactors) -> float:
        """tr(D S D^T) of one module."""
        S = self.of(module)
        if S is None:
            return 0.0
        f = factors.folded(torch.float64)
        return float(((f.B.T @ f.B) * (f.A @ S @ f.A.T)).sum())


def cut_adapter(adapter: Adapter, rank: int, metric: InputMetric | None) -> tuple[Adapter, dict[str, float]]:
    """Cut every module to a rank, in a metric where there is one, else by weights; and the fraction that each lost."""
    pairs = {m: (metric and metric.cut(m, f, rank)) or truncated(f, rank) for m, f in adapter.modules.items()}
    return replace(adapter, modules={m: f for m, (f, _) in pairs.items()}), {m: lost for m, (_, lost) in pairs.items()}


def input_metric(
    adapters: Sequence[Adapter], weights: Sequence[float], statistics: Mapping[str, Any] | None, modules: Sequence[str]
) -> tuple[InputMetric | None, str]:
    """Find the metric in which a merge may be cut: where the moments of every module are at hand, of every task that has it.

    Args:
        adapters: What is merged.
        weights: One each; a task of weight 0 does not count.
        statistics: Adapter -> its second moments; others than moments serve no cut.
        modules: Modules of the merge.

    Returns:
        The metric, and how a cut is made, for a reader: by weights with what is lacking, or "" where nobody gave statistics.
    """
    if not statistics:
        return None, ""
    counted = [a for a, w in zip(adapters, weights, strict=True) if w != 0.0]
    for adapter in counted:
        stats = statistics.get(adapter.name)
        if stats is None or not hasattr(stats, "moments_for"):
            return None, f"by weights: no second moments of {adapter.name} were given"
        if lacking := next((m for m in modules if m in adapter.modules and stats.moments_for(m) is None), None):
            return None, f"by weights: the statistics of {adapter.name} hold no moments of {lacking}"
    return InputMetric(tuple(statistics[a.name] for a in counted)), IN_THE_METRIC
