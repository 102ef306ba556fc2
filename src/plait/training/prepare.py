"""From settings and statistics to a constraint: the spans to stay in, the moments to keep away from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.errors import InputError, UsageError
from plait.statistics.agreement import require_compatible
from plait.statistics.moments import Statistics
from plait.training.constraints import Constraint, Rule
from plait.training.settings import TrainingSettings


def prepare_constraint(
    settings: TrainingSettings,
    adapter: Adapter,
    statistics: Mapping[str, Statistics] | None,
    *,
    task: str,
    device: torch.device | str = "cpu",
) -> Constraint:
    """Make the constraint that the settings ask for, on one adapter.

    Args:
        settings: `constraint` and `constraint_options`: for "projected" ``m`` (rows of the span, default 128),
            ``method`` ("contrastive" by default, or "osrm": whose first m directions) and its ``rho``; for "penalised"
            ``beta`` (default 1) and ``curvature``: whether shifts count by the others' output gradients, which the statistics then hold.
        adapter: Which modules.
        statistics: Task -> statistics, of all tasks; not needed for "free" and "frozen". Exact, sketched or compressed, read or
            opened: of those that stay in their files one site at a time is in memory.
        task: The adapter's task.
        device: Where eigenvectors are computed.

    Raises:
        UsageError: No statistics of this task and at least one other, or others that hold this task too.
        InputError: Statistics that do not compare, or lack a module of the adapter.

    Cost:
        For "penalised" a float32 (d, d) matrix for each site, whatever the number of tasks, as long as the adapter is
        trained; sites are shared by the modules that read them, and a sketch is written out.
    """
    kind, options = settings.constraint, dict(settings.constraint_options)
    if kind in ("free", "frozen"):
        return Constraint(kind)
    if not statistics or task not in statistics or len(statistics) < 2:
        have = f"; given are those of {', '.join(statistics)}" if statistics else ""
        raise UsageError(
            f"constraint {kind!r} needs statistics of this task and of others{have}",
            where=f"task {task}",
            hint="--statistics FILE for each of them, or training.constraint=free",
        )
    _require_usable(statistics, adapter, task)
    if kind == "projected":
        return Constraint(kind, _spans(adapter, statistics, task, options, device))
    beta = float(options.get("beta", 1.0))
    if beta == 0:
        return Constraint(kind)
    return Constraint(kind, _penalties(adapter, statistics, task, beta, curved=bool(options.get("curvature"))))


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
    spaces = compute_subspaces(method, statistics, device=device, **only)[task]
    own = statistics[task]
    return {module: Rule(spaces[own.relative(module)].basis) for module in adapter.modules}


def _require_usable(statistics: Mapping[str, Statistics], adapter: Adapter, task: str) -> None:
    own = statistics[task]
    for name, other in statistics.items():
        require_compatible(own, other)
        if name != task and task in other.provenance.get("tasks", ()):
            raise UsageError(
                f"the statistics of {name!r} were merged from files of {task!r} too",
                hint="pass the other files one by one",
            )
    if lacking := [m for m in adapter.modules if own.relative(m) not in own.modules]:
        raise InputError(
            f"the statistics hold nothing of {lacking[0]}",
            where=f"task {task}",
            hint="collect them for all its modules",
        )
    for module, factors in adapter.modules.items():
        wide = own.modules[own.relative(module)].shape[1]
        if factors.shape[1] != wide:
            raise InputError(
                f"{module} reads {plural(factors.shape[1], 'number')}, its statistics are of {wide}",
                where=f"task {task}",
                hint="they are of another base",
            )


def _penalties(
    adapter: Adapter, statistics: Mapping[str, Statistics], task: str, beta: float, *, curved: bool
) -> dict[str, Rule]:
    """The others' mean m of every site, each task counting the same, and beta / tr(W0 m W0^T) of every module.

    **Deviates**: Curvature is the others' mean too, one G beside one m, its mean eigenvalue 1 and the denominator without it; a sum
    of tr(G_j D m_j D^T) would take as many products as there are others.
    """
    others = [s for name, s in statistics.items() if name != task]
    names = {module: others[0].relative(module) for module in adapter.modules}
    means: dict[str, Tensor] = {}
    traces: dict[str, list[float]] = {}
    for site in dict.fromkeys(others[0].modules[name].site for name in names.values()):
        for s in others:
            moments = s.sites[site]  # once: it may be read from a file here
            m = moments.normalised(torch.float32)
            means[site] = means[site].add_(m) if site in means else m
            traces.setdefault(site, []).append(moments.trace)
        means[site] /= len(others)
    rules = {}
    for module, name in names.items():
        site = others[0].modules[name].site
        energies = [s.modules[name].output_energy / t for s, t in zip(others, traces[site], strict=True)]
        if not (energy := sum(energies) / len(others)) > 0:
            raise InputError(
                f"the other tasks' outputs of {module} are zero: no shift is relative to them",
                where=f"task {task}",
                hint="training.constraint=free, or leave the module out",
            )
        rules[module] = Rule(means[site], beta / energy, _mean_curvature(others, name, task) if curved else None)
    return rules


def _mean_curvature(others: Sequence[Statistics], name: str, task: str) -> Tensor:
    """(out, out) mean over tasks of G / tr G, times out."""
    total: Tensor | None = None
    for gradients in (s.output_gradients_for(name) for s in others):  # each is read from its file here
        if gradients is None or not gradients.trace > 0:
            raise UsageError(
                f"the statistics hold no output gradients of {name}, which curvature is made of",
                where=f"task {task}",
                hint="plait stats --output-gradients puts them into the file; plait run and plait study collect them",
            )
        G = gradients.normalised(torch.float32)
        total = G.clone() if total is None else total.add_(G)
    assert total is not None  # there is at least one other task
    return total * (len(total) / len(others))
