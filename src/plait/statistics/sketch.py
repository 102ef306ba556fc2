"""Sketches: a second moment as rank-k factor plus diagonal, with a bound on what was left out."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from plait.errors import UsageError
from plait.statistics.moments import FACTOR, Moments, Statistics


def compress(moments: Moments, rank: int) -> Moments:
    """The best rank-k part of S plus the diagonal of the rest.

    S = V L V^T; the factor keeps the k largest eigenvalues, the residual is the diagonal of what remains, so the trace
    and every diagonal entry stay exact. With N = S - F^T F (positive semidefinite), the error is ||N - diag N||.

    Args:
        moments: Exact or already sketched.
        rank: k, from 0 to d; nothing is changed where the factor already has no more rows and no residual.

    Returns:
        Moments in factor form; `error` is the measured spectral norm plus the error it came with.

    Cost: one eigen-decomposition, d^3.
    """
    if rank < 0:
        raise UsageError(f"a sketch of rank {rank}")
    if rank >= moments.dim or (moments.form == FACTOR and moments.second.shape[0] <= rank):
        return moments
    S = moments.dense().double()
    values, vectors = torch.linalg.eigh(S)
    kept = values[-rank:].clamp_min(0) if rank else values[:0]
    factor = (kept.sqrt() * vectors[:, S.shape[0] - rank :]).T.flip(0)
    rest = S - factor.T @ factor
    residual = rest.diagonal().clamp_min(0)
    error = torch.linalg.eigvalsh(rest - torch.diag(residual)).abs().max()
    return replace(
        moments,
        second=factor.to(moments.second.dtype),
        form=FACTOR,
        residual=residual.to(moments.second.dtype),
        error=moments.error + float(error),
    )


def compress_statistics(statistics: Statistics, rank: int) -> Statistics:
    """Every site compressed to rank k plus diagonal; the provenance says so."""
    sites = {s: compress(m, rank) for s, m in statistics.sites.items()}
    return replace(statistics, sites=sites, provenance={**statistics.provenance, "sketch": rank})


class FrequentDirections:
    """A sketch that grows with the data: at most 2k rows in memory, whatever number of inputs goes by.

    Liberty's Frequent Directions: when the buffer is full, subtract the k-th squared singular value from all, so that
    0 <= S - F^T F <= (sum of what was subtracted) I at any time. The diagonal of S is kept exactly beside it and the
    residual is what the factor lacks of it; the bound on ||S - F^T F - residual|| is the same sum, because the residual
    is itself the diagonal of a matrix between 0 and that bound.

    Args:
        rank: k, the number of rows kept at the end.
        dim: d.
        dtype, device: Of the buffer; float32 or wider.

    Source: Liberty 2013, arXiv:1206.0594; Ghashami et al. 2016, arXiv:1501.01711.
    **Deviates**: the diagonal residual is ours.
    """

    def __init__(self, rank: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rank = rank
        self.buffer = torch.zeros(0, dim, dtype=dtype, device=device)
        self.diagonal = torch.zeros(dim, dtype=dtype, device=device)
        self.subtracted = 0.0

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        """Add inputs."""
        rows = rows.to(self.buffer.dtype)
        self.diagonal += rows.square().sum(0)
        self.buffer = torch.cat([self.buffer, rows])
        if self.buffer.shape[0] > 4 * self.rank:
            self._shrink(2 * self.rank)

    def finish(self) -> tuple[Tensor, Tensor, float]:
        """Factor (k, d), residual (d,), error bound."""
        if self.buffer.shape[0] > self.rank:
            self._truncate()
        residual = (self.diagonal - self.buffer.square().sum(0)).clamp_min(0)
        return self.buffer, residual, self.subtracted

    def _shrink(self, keep: int) -> None:
        _, values, right = torch.linalg.svd(self.buffer, full_matrices=False)
        squared = values.square()
        cut = float(squared[keep]) if squared.shape[0] > keep else 0.0
        self.subtracted += cut
        self.buffer = (squared[:keep] - cut).clamp_min(0).sqrt()[:, None] * right[:keep]

    def _truncate(self) -> None:
        """At the end the rows beyond k are dropped, not shrunk: the residual takes their diagonal, the bound their norm."""
        _, values, right = torch.linalg.svd(self.buffer, full_matrices=False)
        self.subtracted += float(values[self.rank].square()) if values.shape[0] > self.rank else 0.0
        self.buffer = values[: self.rank, None] * right[: self.rank]
