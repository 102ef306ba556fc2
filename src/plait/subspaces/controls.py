"""Subspaces drawn without data: what PEFT starts from, and orthonormal controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from plait.border.counts import plural
from plait.errors import InputError
from plait.subspaces.inputs import Basis, SiteInputs
from plait.subspaces.registry import subspace_method
from plait.subspaces.solvers import orthonormal_rows


@subspace_method("kaiming", paper="arXiv:2106.09685", row_norm="drawn")
def kaiming(x: SiteInputs) -> Mapping[str, Basis]:
    """PEFT's default: uniform in +-1/sqrt(d), row norm about 0.58; drawn per task and module."""
    return _drawn(x, lambda g: (2 * torch.rand(x.rank, x.dim, generator=g, dtype=torch.float32) - 1) / x.dim**0.5)


@subspace_method("gaussian", paper="arXiv:2106.09685", row_norm="drawn")
def gaussian(x: SiteInputs) -> Mapping[str, Basis]:
    """PEFT's "gaussian": standard deviation 1/r, row norm about sqrt(d)/r; drawn per task and module.

    **Deviates** from the baseline of OSRM's authors, where one seed gives five of eight tasks the same draw.
    """
    return _drawn(x, lambda g: torch.randn(x.rank, x.dim, generator=g, dtype=torch.float32) / x.rank)


@subspace_method("orthonormal")
def orthonormal(x: SiteInputs) -> Mapping[str, Basis]:
    """Draw a random orthonormal basis per task and module (a control)."""
    return _drawn(x, lambda g: _orthonormal(x, g))


@subspace_method("orthonormal_shared")
def orthonormal_shared(x: SiteInputs) -> Mapping[str, Basis]:
    """Draw one random orthonormal basis per module for all tasks (a control)."""
    rows = _orthonormal(x, x.generator())
    return {t: Basis(rows, _norms(rows)) for t in x.tasks}


@subspace_method("orthonormal_disjoint")
def orthonormal_disjoint(x: SiteInputs) -> Mapping[str, Basis]:
    """Rows of one random orthonormal basis, each task its own: A_i A_j^T = 0 for all tasks (a control).

    Orthogonal weights are what several methods ask for; activations do not know of it.

    Raises:
        InputError: The tasks' ranks add up to more than the width.
    """
    names = sorted(x.moments) or sorted(x.tasks)
    if len(names) * x.rank > x.dim:
        raise InputError(f"{plural(len(names), 'task')} of rank {x.rank} at a module of width {x.dim}", where=x.name)
    drawn = torch.randn(x.dim, x.rank * len(names), generator=x.generator(), dtype=torch.float64)
    rows = orthonormal_rows(drawn)
    bases = {name: rows[i * x.rank : (i + 1) * x.rank] for i, name in enumerate(names)}
    return {t: Basis(bases[t], _norms(bases[t])) for t in x.tasks}


def _orthonormal(x: SiteInputs, generator: torch.Generator) -> Tensor:
    return orthonormal_rows(torch.randn(x.dim, x.rank, generator=generator, dtype=torch.float64))


def _drawn(x: SiteInputs, draw: Callable[[torch.Generator], Tensor]) -> Mapping[str, Basis]:
    bases = {}
    for task in x.tasks:
        rows = draw(x.generator(task))
        bases[task] = Basis(rows, _norms(rows))
    return bases


def _norms(rows: Tensor) -> Tensor:
    return rows.double().square().sum(1)
