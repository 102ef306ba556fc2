"""Moving an adapter that is already trained into a subspace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LINEAR, Adapter, LoraFactors
from plait.adapters.one_thread import in_one_thread
from plait.errors import InputError, UsageError
from plait.statistics.moments import Moments, Statistics
from plait.subspaces.compute import Subspace


def move_into(
    adapter: Adapter, subspaces: Mapping[str, Subspace], *, statistics: Statistics | None = None
) -> tuple[Adapter, dict[str, float]]:
    """Rewrite every delta D as B' A' with A' the subspace's rows.

    Without statistics B' = D A'^+, the best in the Frobenius norm. With the adapter's own statistics, M = E[h h^T],
    B' = D M A'^T (A' M A'^T)^+: the best on the inputs its task really has, min tr((D - B' A') M (D - B' A')^T).
    Nothing is trained and no data is read.

    Args:
        adapter: Any LoRA adapter of linear modules.
        subspaces: Module, named as in the adapter or relative to the backbone -> subspace (see `compute_subspaces`).
        statistics: Statistics of the adapter's own task.

    Returns:
        The adapter with scaling 1 and A' exactly the subspace's rows; and for each module the energy kept, in [0, 1]:
        1 - |D - B' A'|^2 / |D|^2, in the norm that was minimised (1 for a delta of zero).

    Raises:
        InputError: No subspace for a module, or one of another width.
        UsageError: An update that is not of a linear module.

    Cost: a QR of (d, r) and an SVD of (r', r') per module; with statistics one product with (d, d).

    **Deviates**: The released code of OSRM multiplies by alpha / r a second time and keeps the first r singular vectors'
    place in A, so that about r / d of the update survives; here the projection is the whole rule.
    """
    modules, kept = {}, {}
    for name, factors in adapter.modules.items():
        if factors.kind != LINEAR:
            raise UsageError(f"{factors.kind} updates have no subspace", where=name)
        short = name if name in subspaces or statistics is None else statistics.relative(name)
        if short not in subspaces:
            raise InputError(
                "no subspace for this module", where=name, hint="collect statistics with these target modules"
            )
        A = subspaces[short].A
        if A.shape[1] != factors.shape[1]:
            raise InputError(f"the subspace has width {A.shape[1]}, the module {factors.shape[1]}", where=name)
        moments = statistics.moments_for(name) if statistics is not None else None
        B, kept[name] = refit(factors, A, moments)
        modules[name] = LoraFactors(A, B.float(), 1.0)
    return replace(adapter, modules=modules), kept


def refit(
    factors: LoraFactors, A: Float[Tensor, "k d"], moments: Moments | None = None
) -> tuple[Float[Tensor, "out k"], float]:
    """Find the B that brings B A nearest to a delta, and the energy kept.

    Args:
        factors: The delta.
        A: Rows to use, in any basis and of any rank.
        moments: Inputs in whose norm to be near; None for the Frobenius norm.
    """
    f, X = factors.folded(torch.float64), A.double()
    if moments is None:
        own, cross, gram = f.A @ f.A.T, f.A @ X.T, X @ X.T
    else:
        joint = moments.project(torch.cat([f.A, X]))
        own, cross, gram = joint[: f.rank, : f.rank], joint[: f.rank, f.rank :], joint[f.rank :, f.rank :]
    coefficients = cross @ in_one_thread(torch.linalg.pinv, gram, hermitian=True)
    squared = f.B.T @ f.B
    total = float((squared * own).sum())
    explained = float((squared * (coefficients @ cross.T)).sum())
    return f.B @ coefficients, min(1.0, max(0.0, explained / total)) if total > 0 else 1.0
