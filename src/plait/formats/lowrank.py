"""A dense delta as the best LoRA factors of a rank, and what that rank leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LINEAR, LoraFactors
from plait.adapters.one_thread import in_one_thread

# Up to this many columns the Gram matrix is decomposed whole (a second or so); beyond, only as much as the rank needs.
_WHOLE = 2048
_MORE = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Cut:
    """Factors of a delta, and the energies that say how good they are.

    Args:
        factors: Of scaling 1.
        energy: Squared Frobenius norm of the delta.
        lost: Multiple of the rank -> squared norm of what is left out at that multiple of the rank; 1 is the factors' own.
    """

    factors: LoraFactors
    energy: float
    lost: dict[int, float]


def best_rank(delta: Float[Tensor, "out in"], rank: int, kind: str = LINEAR) -> Cut:
    """The best approximation of a delta at a rank, by the eigenvectors of its smaller Gram matrix.

    With V the top eigenvectors of D^T D, D V V^T is the truncated SVD of D (Eckart and Young), and what it leaves out is
    the sum of the other eigenvalues.

    Args:
        delta: Dense.
        rank: At least 1; one above the delta's own changes nothing.
        kind: Of the module.

    Returns:
        Float32 factors; one of the two is orthonormal, the other a projection of the delta.

    Cost:
        out * in * min(out, in) multiplications and an eigen-decomposition of min(out, in); beyond 2048 a block power
        iteration instead, whose error is then an upper bound.
    """
    short = delta if delta.shape[0] >= delta.shape[1] else delta.T
    D = short.double()
    width = D.shape[1]
    k = min(rank, width)
    gram = D.T @ D
    energy = float(gram.trace())
    if width <= _WHOLE:
        values, vectors = in_one_thread(torch.linalg.eigh, gram)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    else:
        vectors = _subspace(gram, min(width, max(_MORE) * k + 8))
        values = (vectors * (gram @ vectors)).sum(0)
    V = vectors[:, :k]
    lost = {m: max(0.0, energy - float(values[: m * k].sum())) for m in _MORE}
    left, right = (D @ V).float(), V.T.contiguous().float()
    if short is delta:
        return Cut(LoraFactors(right, left, 1.0, kind), energy, lost)
    return Cut(LoraFactors(left.T.contiguous(), right.T.contiguous(), 1.0, kind), energy, lost)


def _subspace(gram: Float[Tensor, "n n"], width: int) -> Float[Tensor, "n k"]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(gram.shape[0], width, dtype=gram.dtype, generator=generator)
    Q = in_one_thread(torch.linalg.qr, start)[0]
    for _ in range(8):
        Q = in_one_thread(torch.linalg.qr, gram @ Q)[0]
    values, rotation = in_one_thread(torch.linalg.eigh, Q.T @ gram @ Q)
    turned: Tensor = Q @ rotation[:, values.argsort(descending=True)]
    return turned
