"""What a subspace method sees: one site of all tasks, every matrix computed only when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from plait.errors import InputError
from plait.seeds import named_seed
from plait.statistics.moments import FACTOR, Moments


@dataclass(frozen=True, slots=True)
class Basis:
    """What a method returns for one task.

    Args:
        rows: (r, d), orthonormal, or as drawn for the random methods.
        energies: (r,), what the method ranks directions by, in the order of the rows.
        record: Solver, residual, ties: whatever a reader should know.
    """

    rows: Float[Tensor, "r d"]
    energies: Float[Tensor, " r"]
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteInputs:
    """One site (or, for methods drawn without data or reading weights, one module) of all tasks.

    Args:
        name: Name of the site or module.
        dim: d.
        rank: r.
        tasks: Tasks a basis is wanted for.
        moments: Task -> moments of all known tasks, the wanted ones among them.
        background: Moments of text that stands for unknown future tasks, or None.
        weight: Share of the background among the others, in [0, 1].
        seed: Seed of the whole run; draw from `generator`.
        device: Where to compute.
        base_weight: The module's own W0, for methods that need "weights"; else None.
    """

    name: str
    dim: int
    rank: int
    tasks: tuple[str, ...]
    moments: Mapping[str, Moments]
    background: Moments | None = None
    weight: float = 0.0
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    base_weight: Float[Tensor, "out d"] | None = None

    def own(self, task: str) -> Float[Tensor, "d d"]:
        """m_t, trace-normalised, in float64; computed at every call, so that only what is in use takes memory."""
        return self._normalised(self.moments[task], task)

    def others(self, task: str) -> Float[Tensor, "d d"]:
        """Average the other tasks' m, mixed with the background by `weight`: a sum over the others, in float64."""
        names = self.other_tasks(task)
        mixed = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.device)
        for name in names:
            mixed.add_(self.own(name), alpha=(1 - self._share) / len(names))
        return self._with_background(mixed)

    def pencil(self) -> tuple[Float[Tensor, "d d"], float]:
        """P and c with c * others(t) = P - m_t for every task t: the one matrix that serves all of them.

        With S = sum over all tasks and w the background's share, c = (T - 1)/(1 - w) and P = S + c w b; where nothing
        but background counts, others(t) = b for all and c is 0 (P = b, nothing to take off).
        """
        if self._share == 1.0:
            return self._with_background(torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.device)), 0.0
        c = (len(self.moments) - 1) / (1 - self._share)
        total = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.device)
        for name in sorted(self.moments):
            self._add_normalised(total, name)
        return self._with_background(total, c), c

    def other_tasks(self, task: str) -> list[str]:
        """List the other tasks' names, sorted: sums never depend on the order in which files were given."""
        return [t for t in sorted(self.moments) if t != task]

    def other_factor(self, task: str) -> Float[Tensor, "k d"] | None:
        """Give a factor of the others' m while it has fewer than d rows, else None."""
        if self.background is not None:
            return None
        parts = [self.moments[t] for t in self.other_tasks(task)]
        if (
            any(p.form != FACTOR or p.residual is not None for p in parts)
            or sum(len(p.second) for p in parts) >= self.dim
        ):
            return None
        rows = [p.second.to(self.device, torch.float64) / (p.trace * len(parts)) ** 0.5 for p in parts if p.trace > 0]
        return torch.cat(rows) if rows else None

    def generator(self, *names: str) -> torch.Generator:
        """Seed a CPU generator by (seed, site or module, names): order does not matter."""
        return torch.Generator().manual_seed(named_seed(self.seed, "\0".join((self.name, *names))))

    def resolution(self, tasks: Sequence[str]) -> float:
        """Relative size below which eigenvalues of these tasks' moments are rounding.

        The unit of their dtype, or what a decomposition in float64 leaves, d times its unit, whichever is more.
        """
        stored = max(torch.finfo(self.moments[t].second.dtype).eps for t in tasks)
        return max(stored, self.dim * torch.finfo(torch.float64).eps)

    @property
    def _share(self) -> float:
        return self.weight if self.background is not None else 0.0

    def _with_background(self, mixed: Tensor, factor: float = 1.0) -> Tensor:
        if self.background is not None and self._share > 0:
            mixed.add_(self._normalised(self.background, "background"), alpha=factor * self._share)
        return mixed

    def _add_normalised(self, total: Tensor, task: str) -> None:
        """Add m_t in place; a dense one goes through no float64 copy of its own."""
        moments = self.moments[task]
        if moments.form == FACTOR or not moments.trace > 0:
            total.add_(self.own(task))
        else:
            total.add_(moments.second.to(self.device), alpha=1 / moments.trace)

    def _normalised(self, moments: Moments, label: str) -> Tensor:
        trace = moments.trace
        if not trace > 0:
            raise InputError(
                f"the second moment of task {label!r} is zero here", where=self.name, hint="a dead layer, or no data"
            )
        second = moments.second.to(self.device)
        if moments.form == FACTOR:
            return Moments.dense(moments.to(self.device)).double().div_(trace)
        return second.double().div_(trace) if second.dtype != torch.float64 else second / trace
