"""From settings and statistics to a constraint: the spans to stay in, the moments to keep away from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plait.adapters.lora import Adapter
from plait.errors import UsageError
from plait.statistics.moments import Moments, Statistics
from plait.training.constraints import Constraint, Rule
from plait.training.settings import TrainingSettings

_OPTIONS = {"projected": {"m", "method", "rho"}, "penalised": {"beta"}}


def prepare_constraint(
    settings: TrainingSettings,
    adapter: Adapter,
    statistics: Mapping[str, Statistics] | None,
    *,
    task: str,
    device: torch.device | str = "cpu",
) -> Constraint:
    """The constraint that the settings ask for, on one adapter.

    Args:
        settings: `constraint` and `constraint_options`: for "projected" ``m`` (rows of the span, default 128),
            ``method`` ("contrastive" by default, or "osrm": whose first m directions) and its ``rho``; for "penalised"
            ``beta`` (default 1).
        adapter: Which modules.
        statistics: Task -> statistics, of all tasks; not needed for "free" and "frozen".
        task: The adapter's task.
        device: Where eigenvectors are computed.

    Raises:
        UsageError: An unknown option, or no statistics of this task and at least one other.
    """
    kind, options = settings.constraint, dict(settings.constraint_options)
    if unknown := sorted(set(options) - _OPTIONS.get(kind, set())):
        raise UsageError(f"constraint {kind!r} has no option {unknown[0]!r}", where="constraint_options")
    if kind in ("free", "frozen"):
        return Constraint(kind)
    if not statistics or task not in statistics or len(statistics) < 2:
        raise UsageError(f"constraint {kind!r} needs statistics of this task and of others", where=f"task {task}")
    if kind == "projected":
        return Constraint(kind, _spans(adapter, statistics, task, options, device))
    beta = float(options.get("beta", 1.0))
    return Constraint(kind, _penalties(adapter, statistics, task, beta))


def _spans(
    adapter: Adapter,
    statistics: Mapping[str, Statistics],
    task: str,
    options: Mapping[str, Any],
    device: torch.device | str,
) -> dict[str, Rule]:
    from plait.subspaces import compute_subspaces

    method, m = str(options.get("method", "contrastive")), int(options.get("m", 128))
    more = {"rho": float(options["rho"])} if "rho" in options else {}
    narrowest = min(f.shape[1] for f in adapter.modules.values())
    if not adapter.rank <= m <= narrowest:
        raise UsageError(
            f"m is {m}, expected from the rank {adapter.rank} to the width {narrowest}", where="constraint_options"
        )
    only: dict[str, Any] = {"tasks": (task,), "rank": m, "row_norm": 1.0, "options": more}
    found = compute_subspaces(method, statistics, device=device, **only)[task]
    own = statistics[task]
    return {module: Rule(found[own.relative(module)].basis) for module in adapter.modules}


def _penalties(adapter: Adapter, statistics: Mapping[str, Statistics], task: str, beta: float) -> dict[str, Rule]:
    others = [s for name, s in statistics.items() if name != task]
    shared: dict[str, Tensor] = {}
    rules = {}
    for module in adapter.modules:
        name = others[0].relative(module)
        info = others[0].modules[name]
        if info.site not in shared:
            shared[info.site] = mean_moment([s.sites[s.modules[name].site] for s in others])
        energy = sum(s.modules[name].output_energy / s.sites[s.modules[name].site].trace for s in others) / len(others)
        rules[module] = Rule(shared[info.site], beta / energy)
    return rules


def mean_moment(moments: list[Moments]) -> Tensor:
    """The mean of trace-normalised second moments: what the other tasks, each counting the same, feed into a site."""
    return torch.stack([m.normalised(torch.float32) for m in moments]).mean(0)
