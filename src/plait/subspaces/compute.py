"""From statistics to subspaces: every site of every task, by any registered method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from plait.errors import InputError, RunError, UsageError
from plait.options import checked_options
from plait.statistics.agreement import merge_statistics, require_compatible
from plait.statistics.moments import ModuleInfo, Statistics
from plait.subspaces.inputs import Basis, SiteInputs
from plait.subspaces.registry import (
    SubspaceMethod,
    checked_row_norm,
    default_row_norm,
    find_subspace_method,
)


@dataclass(frozen=True, slots=True)
class Subspace:
    """Where one module's A starts.

    Args:
        basis: (r, d) float32, orthonormal rows (the random rows as drawn for kaiming and gaussian).
        energies: (r,) float64, what the method ranked the rows by.
        row_norm: Length of A's rows; None leaves the basis as it is.
        method: Name of the method.
        record: Options, solver, residuals, ties.
    """

    basis: Float[Tensor, "r d"]
    energies: Float[Tensor, " r"]
    row_norm: float | None
    method: str
    record: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """How it was found and how large it is, not its numbers."""
        rank, dim = self.basis.shape
        return f"Subspace({self.method!r}, rank={rank}, dim={dim})"

    @property
    def A(self) -> Float[Tensor, "r d"]:  # noqa: N802
        """The matrix a LoRA starts with, float32: the same bits at every call."""
        if self.row_norm is None or self.row_norm == 1.0:
            return self.basis.clone()
        return self.basis * self.row_norm


def compute_subspaces(
    method: str,
    statistics: Mapping[str, Statistics],
    *,
    tasks: Sequence[str] | None = None,
    rank: int = 8,
    row_norm: float | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    background: Statistics | Sequence[Statistics] | None = None,
    background_weight: float = 0.5,
    device: torch.device | str = "cpu",
    on_site: Callable[[int, int], None] = lambda done, sites: None,
    weights: Callable[[str], Tensor] | None = None,
) -> dict[str, dict[str, Subspace]]:
    """Subspaces of every wanted task in every module.

    Args:
        method: A registered name.
        statistics: Task -> statistics; the others of a task are all other entries.
        tasks: Wanted ones; all by default. To add a task to a pool: the pool's files, the own ones, and the own name.
        rank: r.
        row_norm: Length of A's rows; by default the method's own (see `default_row_norm`).
        options: Options of the method.
        seed: For what is drawn; each module and task draws from its own hash of it.
        background: Statistics of public text that stand for unknown future tasks.
        background_weight: Their share among the others, in [0, 1]; 1 leaves the known tasks out. Where no other task is
            given, any share above 0 is all.
        device: Where to compute.
        on_site: Called after each site with how many are done, and how many there are.
        weights: Module -> its weight in the base, (out, in); asked for only where the method needs it (`corda`).

    Returns:
        Task -> module -> Subspace; modules that read one site share one basis (except what is drawn without data, or reads weights).

    Raises:
        UsageError: Unknown method, option or task; a weight out of range; a rank below 1; no others, or no weights, for a method
            that needs them.
        InputError: Statistics of different bases; a rank above a module's width; too few inputs.

    Cost: see the methods; sites are independent, memory is that of one site of all tasks.
    """
    chosen = find_subspace_method(method)
    settings = checked_options(chosen, options)
    norm = checked_row_norm(row_norm)
    wanted = tuple(tasks) if tasks is not None else tuple(statistics)
    pool = _checked_background(background, background_weight)
    _require_usable(chosen, statistics, wanted, rank, pool, background_weight)
    if pool is not None and len(statistics) == 1 and background_weight > 0:
        background_weight = 1.0  # there is nobody else to mix it with
    first = next(iter(statistics.values()))
    spaces: dict[str, dict[str, Subspace]] = {t: {} for t in wanted}
    sites = readers(first.modules)
    reads_weights = "weights" in chosen.needs
    if reads_weights and weights is None:
        raise UsageError(
            f"{method} needs the base's weights", hint="plait init and plait run read them; else pass weights="
        )
    for number, (site, modules) in enumerate(sites.items(), start=1):
        moments = {t: s.sites[site] for t, s in statistics.items()}
        for name in modules if chosen.per_module else [site]:
            inputs = SiteInputs(
                name=name,
                dim=moments[wanted[0]].dim,
                rank=rank,
                tasks=wanted,
                moments=moments,
                background=pool.sites[site] if pool else None,
                weight=background_weight if pool else 0.0,
                seed=seed,
                device=torch.device(device),
                base_weight=weights(name) if weights is not None and reads_weights else None,
            )
            solved = solve_site(chosen, inputs, settings, norm)
            for task, subspace in solved.items():
                spaces[task] |= dict.fromkeys([name] if chosen.per_module else modules, subspace)
        on_site(number, len(sites))
    return {t: {m: spaces[t][m] for m in first.modules} for t in wanted}


def solve_site(
    method: SubspaceMethod, inputs: SiteInputs, options: Mapping[str, Any], row_norm: float | None
) -> dict[str, Subspace]:
    """Solve one site of all wanted tasks, checked.

    Raises:
        RunError: A method returned something that is not finite.
    """
    if inputs.rank > inputs.dim:
        raise InputError(
            f"rank {inputs.rank} at a module of width {inputs.dim}",
            where=inputs.name,
            hint="a rank no larger than that",
        )
    bases = method.function(inputs, **options)
    norm = row_norm if row_norm is not None else default_row_norm(method, inputs.dim, inputs.rank)
    return {task: _subspace(method, inputs, bases[task], options, norm) for task in inputs.tasks}


def _subspace(
    method: SubspaceMethod, inputs: SiteInputs, basis: Basis, options: Mapping[str, Any], norm: float | None
) -> Subspace:
    rows = basis.rows
    if not bool(rows.isfinite().all()):
        raise RunError(f"{method.name} gave NaN or infinity", where=inputs.name)
    if norm is not None:
        rows = rows / torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True)
    record = {"options": dict(options), "background_weight": inputs.weight, **basis.record}
    return Subspace(rows.float().cpu(), basis.energies.double().cpu(), norm, method.name, record)


def completed(subspaces: Mapping[str, Subspace]) -> dict[str, int]:
    """Module -> rows of its basis that were completed from outside the tied space (see `osrm`); only where there are any."""
    return {m: s.record["completed"] for m, s in subspaces.items() if s.record.get("completed")}


def readers(modules: Mapping[str, ModuleInfo]) -> dict[str, list[str]]:
    """Site -> the modules that read it.

    >>> readers({"query": ModuleInfo("query", (2, 2), 1.0), "key": ModuleInfo("query", (2, 2), 1.0)})
    {'query': ['query', 'key']}
    """
    sites: dict[str, list[str]] = {}
    for name, info in modules.items():
        sites.setdefault(info.site, []).append(name)
    return sites


def _checked_background(background: Statistics | Sequence[Statistics] | None, weight: float) -> Statistics | None:
    if not 0.0 <= weight <= 1.0:
        raise UsageError(f"background weight {weight!r}, expected a number from 0 to 1")
    if background is None or isinstance(background, Statistics):
        return background
    return merge_statistics(*background) if background else None


def _require_usable(
    method: SubspaceMethod,
    statistics: Mapping[str, Statistics],
    wanted: Iterable[str],
    rank: int,
    background: Statistics | None,
    weight: float,
) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UsageError(f"rank {rank!r}, expected an integer above 0")
    if not statistics:
        raise UsageError("no statistics given")
    for task in wanted:
        if task not in statistics:
            raise UsageError(f"no statistics of task {task!r}", hint=f"known: {', '.join(statistics)}")
    first, *rest = statistics.values()
    for other in [*rest, *([background] if background else [])]:
        require_compatible(first, other)
    if "others" in method.needs:
        for task in wanted:
            _require_apart(task, statistics, background)
    replaced = background is not None and weight > 0 and "moments" in method.needs
    if "others" in method.needs and len(statistics) < 2 and not replaced:
        raise UsageError(f"{method.name} needs other tasks' statistics", hint="pass --others FILE or --background FILE")


def _require_apart(task: str, statistics: Mapping[str, Statistics], background: Statistics | None) -> None:
    """Refuse sums among the others that the task's own rows are in: it would be kept away from itself."""
    recorded = statistics[task].provenance.get("task", task)
    others = {f"the statistics of {t!r}": s for t, s in statistics.items() if t != task}
    for what, other in (others | ({"the background": background} if background else {})).items():
        if {task, recorded} & set(other.provenance.get("tasks", ())):
            raise UsageError(f"{what} hold those of {recorded!r} too", hint="pass the other files one by one")
