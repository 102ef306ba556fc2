"""The best factors of a dense difference at a rank or an energy, in the metric of the inputs where that is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LINEAR, LoraFactors
from plait.adapters.one_thread import in_one_thread

# Up to this many rows or columns, the smaller number, the Gram matrix is decomposed whole; beyond, as far as is needed.
_WHOLE = 2048
_ITERATIONS, _MORE = 6, 10


@dataclass(frozen=True, slots=True)
class Extracted:
    """Factors of one module's difference, and what they keep.

    Args:
        factors: Of scaling 1, float32.
        energy: Squared Frobenius norm of the difference D.
        lost: Squared norm of D - B A, from the factors as they are, in float64.
        metric: tr(D M D^T), with statistics.
        metric_lost: tr((D - B A) M (D - B A)^T), with statistics.
    """

    factors: LoraFactors
    energy: float
    lost: float
    metric: float | None = None
    metric_lost: float | None = None


def extracted(
    D: Float[Tensor, "out in"],
    *,
    rank: int | None = None,
    energy: float | None = None,
    moments: Float[Tensor, "in in"] | None = None,
    kind: str = LINEAR,
    seed: int = 0,
) -> Extracted:
    """The factors B A nearest to a difference: min tr((D - B A) M (D - B A)^T) over all of a rank, M the inputs' second moment.

    With M = L L^T the loss is |D L - B A L|^2, whose minimum over matrices of rank r is the truncated SVD of D L = U S V^T
    (Eckart and Young); B = U_r and A = U_r^T D attain it, since U_r U_r^T D L is that SVD, and no inverse of M is needed.
    Without moments M is the identity, and B A is the truncated SVD of D.

    Args:
        D: float32.
        rank: At least 1; None with an `energy`.
        energy: Share of tr(D M D^T) to keep, in (0, 1]: the smallest rank that keeps it.
        moments: M, up to a factor.
        kind: Of the module.
        seed: Of the start of the power iterations, which only large matrices need.

    Cost: out * in * min(out, in) multiplications; beyond 2048 rows and columns, 6 power iterations of a block.
    """
    exact = D.double()
    seen = exact if moments is None else exact @ _root(moments)
    total = float(
        in_one_thread(torch.sum, seen.square())
    )  # an energy is cut by it, so its last bits are not to follow the threads
    U, values = _left(seen, rank, energy, total, seed)
    k = _kept(values, total, rank, energy)
    U = U[:, :k]
    A = U.T @ exact
    size = A.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    factors = LoraFactors((A / size[:, None]).float(), (U * size).float(), 1.0, kind)
    lost, metric_lost = loss_of(exact, factors, moments)
    whole = float(exact.square().sum())
    return Extracted(factors, whole, lost, None if moments is None else total, metric_lost)


def loss_of(
    D: Tensor, factors: LoraFactors, moments: Float[Tensor, "in in"] | None = None
) -> tuple[float, float | None]:
    """|D - B A|^2 and, with moments, tr((D - B A) M (D - B A)^T), in float64."""
    rest = D.double() - factors.delta(torch.float64)
    plain = float(rest.square().sum())
    return plain, None if moments is None else float(((rest @ moments.double()) * rest).sum())


def _root(moments: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """L with L L^T = M; eigenvalues below zero are rounding."""
    values, vectors = in_one_thread(torch.linalg.eigh, moments.double())
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def _left(
    X: Float[Tensor, "out in"], rank: int | None, energy: float | None, total: float, seed: int
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"]]:
    """Left singular vectors of a matrix and squared singular values, largest first: all, or as many as are wanted."""
    short = min(X.shape)
    if short <= _WHOLE:
        return _all(X)
    width = min(short, (rank or 32) + _MORE)
    while True:
        # Its products too: of few rows and long sums they follow the number of threads, on some processors whatever MKL is told.
        U, values = in_one_thread(_block, X, width, seed)
        enough = rank is not None or float(values[: width - _MORE].sum()) >= (energy or 0.0) * total
        if enough or width == short:
            return (U, values) if width < short else _all(X)
        width = min(short, 2 * width)


def _all(X: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"]]:
    tall = X.shape[0] > X.shape[1]
    values, vectors = in_one_thread(torch.linalg.eigh, X.T @ X if tall else X @ X.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if not tall:
        return vectors, values
    sizes = values.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    kept = max(1, int((values > values[:1] * 1e-14).sum()))  # below, directions are rounding and not orthonormal
    return in_one_thread(torch.linalg.qr, (X @ vectors[:, :kept]) / sizes[:kept])[0], values[:kept]


def _block(X: Float[Tensor, "out in"], width: int, seed: int) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"]]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(X.shape[1], width, dtype=X.dtype, generator=generator)
    Q = torch.linalg.qr(X @ start)[0]
    for _ in range(_ITERATIONS):
        Q = torch.linalg.qr(X @ torch.linalg.qr(X.T @ Q)[0])[0]
    inner = Q.T @ X
    values, turn = torch.linalg.eigh(inner @ inner.T)
    return Q @ turn.flip(1), values.flip(0).clamp(min=0)


def _kept(values: Float[Tensor, " k"], total: float, rank: int | None, energy: float | None) -> int:
    """How many directions: the rank, or as few as keep the energy; none below rounding, at least one."""
    real = max(1, int((values > values[:1] * 1e-14).sum()))
    if rank is not None:
        return min(rank, real)
    reached = (values.cumsum(0) >= (energy or 1.0) * total * (1 - 1e-12)).nonzero()
    return min(int(reached[0]) + 1, real) if len(reached) else real
