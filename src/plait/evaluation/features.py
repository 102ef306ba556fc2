"""What is known of adapters before they are merged, and might tell how much a merge will cost each task."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plait.adapters.lora import Adapter
from plait.adapters.one_thread import in_one_thread
from plait.evaluation.interference import predicted_shifts
from plait.merging.spectra.core import gram
from plait.statistics import Statistics

Matrix = npt.NDArray[np.float64]
FEATURES = ("shift", "cosine", "norm", "overlap")


def features(adapters: Mapping[str, Adapter], statistics: Mapping[str, Statistics]) -> dict[str, dict[str, float]]:
    """Predictors of what task j loses when all adapters are added up, from files alone.

    Args:
        adapters: Task -> its adapter; all with the same modules.
        statistics: Task -> its statistics.

    Returns:
        Task j -> ``shift``: the others' predicted output shift on j's inputs, summed over them, mean over modules;
        ``cosine``: mean absolute cosine of j's task vector with each other's; ``norm``: norm of the others' over the own;
        ``overlap``: mean over others and modules of |Q_i Q_j^T|^2 / r, Q the orthonormalised rows of A (1 for equal spans).

    Cost: T^2 small products a module.
    """
    names = list(adapters)
    products: Matrix = np.sum([_gram([adapters[n] for n in names], m) for m in adapters[names[0]].modules], axis=0)
    overlap = _overlap([adapters[n] for n in names])
    shifts = predicted_shifts(adapters, statistics)
    shift = np.array([[shifts[i][j] for j in names] for i in names])
    norms = np.sqrt(np.maximum(np.diag(products), 0.0))
    found = {}
    for j, name in enumerate(names):
        others = [i for i in range(len(names)) if i != j]
        found[name] = {
            "shift": float(shift[others, j].sum()),
            "cosine": float(np.mean(np.abs(products[others, j]) / np.maximum(norms[others] * norms[j], 1e-30))),
            "norm": float(np.sqrt((norms[others] ** 2).sum()) / max(norms[j], 1e-30)),
            "overlap": float(overlap[others, j].mean()),
        }
    return found


def task_vector_norm(adapter: Adapter) -> float:
    """Frobenius norm of a whole task vector, from the factors."""
    return math.sqrt(max(0.0, sum(f.norm_squared() for f in adapter.modules.values())))


def _gram(adapters: list[Adapter], module: str) -> Matrix:
    """Multiply the deltas of one module: (T, T) inner products tr(B_i^T B_j A_j A_i^T)."""
    f = [a.modules[module].folded() for a in adapters]
    products: Matrix = gram([x.A for x in f], [x.B for x in f]).numpy()
    return products


def _overlap(adapters: list[Adapter]) -> Matrix:
    total = np.zeros((len(adapters), len(adapters)))
    modules = list(adapters[0].modules)
    for module in modules:
        spans: list[Tensor] = [in_one_thread(torch.linalg.qr, a.modules[module].A.double().T)[0] for a in adapters]
        for i, p in enumerate(spans):
            for j, q in enumerate(spans):
                total[i, j] += float((p.T @ q).square().sum()) / min(p.shape[1], q.shape[1])
    return total / len(modules)
