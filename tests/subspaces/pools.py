"""Statistics of made-up features: correlated tokens, each task with directions of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.statistics.moments import FACTOR, ModuleInfo, Moments, Statistics, rotated


def features(task: int, n: int, dim: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """n inputs: a spectrum all tasks share, and a few directions that only this one uses much."""
    shared = torch.Generator().manual_seed(99)
    mix = torch.linalg.qr(torch.randn(dim, dim, generator=shared, dtype=torch.float64)).Q
    scales = torch.logspace(0, -1.5, dim, dtype=torch.float64)
    own = torch.Generator().manual_seed(task)
    strong = torch.randperm(dim, generator=own)[: max(1, dim // 12)]
    scales = scales.clone()
    scales[strong] *= torch.linspace(3, 8, len(strong), dtype=torch.float64)
    return (torch.randn(n, dim, generator=own, dtype=torch.float64) * scales @ mix).to(dtype)


def moments_of(H: Tensor) -> Moments:
    few = len(H) < H.shape[1]
    second, form = (rotated(H), FACTOR) if few else (H.T @ H, "dense")
    return Moments(len(H), H.sum(0), second, form, padded_count=2 * len(H), padded_total=H.sum(0) * 1.5)


def pool(tasks: int = 4, n: int = 400, dim: int = 32, *, dtype: torch.dtype = torch.float64) -> dict[str, Statistics]:
    """Task -> statistics of one site that two modules read."""
    modules = {"a.q": ModuleInfo("a.q", (dim, dim), 1.0), "a.v": ModuleInfo("a.q", (dim // 2, dim), 1.0)}
    return {
        f"t{i}": Statistics(
            {"a.q": moments_of(features(i, n, dim, dtype=dtype))}, modules, {"base": "b", "pool": "token"}
        )
        for i in range(tasks)
    }


def normalised(statistics: dict[str, Statistics]) -> dict[str, Tensor]:
    return {t: s.sites["a.q"].normalised(torch.float64) for t, s in statistics.items()}


def others(m: dict[str, Tensor], task: str) -> Tensor:
    return torch.stack([m[t] for t in m if t != task]).mean(0)


def base_weight(module: str) -> Tensor:
    """The weight of a module of `pool` at its default width, drawn by its name."""
    out = {"a.q": 32, "a.v": 16}[module]
    return torch.randn(out, 32, generator=torch.Generator().manual_seed(out), dtype=torch.float32)
