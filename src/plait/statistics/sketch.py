"""Sketches: a second moment as rank-k factor plus a coarse rest, with a bound on what was left out."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.one_thread import in_one_thread
from plait.errors import UsageError
from plait.statistics.moments import FACTOR, Moments, Statistics, packed, rotated

TAIL_LEVELS = 127  # of an 8-bit tail, to either side of zero


def compress(moments: Moments, rank: int, *, tail: bool = True) -> Moments:
    """Split S into a part of rank k, the diagonal of the rest exactly, and the rest's correlations in 8 bits.

    With v = diag S, the factor keeps the k largest eigenvectors of the correlations S_ij / sqrt(v_i v_j), scaled back:
    what matters to `contrastive` is relative, so a few coordinates of huge energy must not use up the rank. The rest N
    has a long tail whose correlations matter together: rank 64 and the diagonal alone keep three quarters of
    contrastive's objective at d 768, with the 8-bit tail over 99 %. The tail is shrunk by what rounding made negative,
    so the sketch stays positive semidefinite; trace and diagonal are exact.

    Args:
        moments: Exact or already sketched.
        rank: k, at least 0; nothing is changed where a factor already has no more rows.
        tail: Keep the 8-bit tail: d^2 / 2 bytes beside 4 k d.

    Returns:
        Moments in factor form; `error` is the measured spectral norm of what was lost, plus the error it came with.

    Cost: three eigen-decompositions, d^3.
    """
    if rank < 0:
        raise UsageError(f"a sketch of rank {rank}")
    if rank >= moments.dim or (moments.form == FACTOR and moments.tail is None and moments.second.shape[0] <= rank):
        return moments
    S = moments.dense().double()
    spread = S.diagonal().clamp_min(0).sqrt()
    values, vectors = in_one_thread(torch.linalg.eigh, S / _outer(spread))
    kept = values[-rank:].clamp_min(0) if rank else values[:0]
    factor = ((kept.sqrt() * vectors[:, S.shape[0] - rank :]) * spread[:, None]).T.flip(0).to(moments.second.dtype)
    rest = S - factor.T.double() @ factor.double()
    small = replace(
        moments,
        second=factor,
        form=FACTOR,
        residual=rest.diagonal().clamp_min(0).to(factor.dtype),
        tail=None,
        step=0.0,
    )
    if tail:
        codes, step = _coded(rest)
        small = replace(small, tail=codes, step=step)
    lost = in_one_thread(torch.linalg.eigvalsh, S - small.dense().double()).abs().max()
    return replace(small, error=moments.error + float(lost))


def _coded(rest: Float[Tensor, "d d"]) -> tuple[Tensor, float]:
    """Correlations of a positive semidefinite matrix, off the diagonal, in 8 bits."""
    correlations = rest / _outer(rest.diagonal().clamp_min(0).sqrt())
    correlations.fill_diagonal_(0)
    largest = float(correlations.abs().max())
    if largest == 0.0:
        return packed(correlations.to(torch.int8)), 0.0
    codes = (correlations.sign() * (correlations.abs() / largest).sqrt() * TAIL_LEVELS).round()
    step = largest / TAIL_LEVELS**2
    lowest = float(in_one_thread(torch.linalg.eigvalsh, codes * codes.abs() * step)[0])
    return packed(codes.to(torch.int8)), step / max(1.0, -lowest)


def _outer(spread: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
    """The products of all pairs; 1 where one of them is zero, so that 0 / 0 is 0."""
    products = spread[:, None] * spread
    return torch.where(products > 0, products, torch.ones_like(products))


def compress_statistics(statistics: Statistics, rank: int, *, tail: bool = True) -> Statistics:
    """Compress every site, and the output gradients of every module; the provenance says so."""
    sites = {s: compress(m, rank, tail=tail) for s, m in statistics.sites.items()}
    gradients = {n: compress(m, rank, tail=tail) for n, m in statistics.output_gradients.items()}
    provenance = {**statistics.provenance, "sketch": rank}
    return replace(statistics, sites=sites, output_gradients=gradients, provenance=provenance)


class FrequentDirections:
    """A sketch that grows with the data: at most 2k rows in memory, whatever number of inputs goes by.

    Liberty's Frequent Directions: when the buffer is full, subtract the k-th squared singular value from all, so that
    0 <= S - F^T F <= (sum of what was subtracted) I at any time. The diagonal of S is kept exactly beside it and the
    residual is what the factor lacks of it; the bound on ||S - F^T F - residual|| is the same sum, because the residual
    is itself the diagonal of a matrix between 0 and that bound.

    Args:
        rank: k, the number of rows kept at the end.
        dim: d.
        dtype, device: Where and how the buffer is kept; float32 or wider.

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
        """Factor (k, d), residual (d,), error bound; no row of the factor is an input, of however few it is made."""
        if self.buffer.shape[0] > self.rank:
            self._truncate()
        else:
            self.buffer = rotated(self.buffer)
        residual = (self.diagonal - self.buffer.square().sum(0)).clamp_min(0)
        return self.buffer, residual, self.subtracted

    def _shrink(self, keep: int) -> None:
        _, values, right = in_one_thread(torch.linalg.svd, self.buffer, full_matrices=False)
        squared = values.square()
        cut = float(squared[keep]) if squared.shape[0] > keep else 0.0
        self.subtracted += cut
        self.buffer = (squared[:keep] - cut).clamp_min(0).sqrt()[:, None] * right[:keep]

    def _truncate(self) -> None:
        """At the end the rows beyond k are dropped, not shrunk: the residual takes their diagonal, the bound their norm."""
        _, values, right = in_one_thread(torch.linalg.svd, self.buffer, full_matrices=False)
        self.subtracted += float(values[self.rank].square()) if values.shape[0] > self.rank else 0.0
        self.buffer = values[: self.rank, None] * right[: self.rank]
