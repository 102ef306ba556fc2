"""Cuts to a rank in the metric of the inputs: what a layer puts out stays nearest, not its weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LINEAR, LoraFactors
from plait.adapters.one_thread import in_one_thread


def cut_solution(D: Float[Tensor, "out in"], DS: Float[Tensor, "out in"], rank: int) -> tuple[LoraFactors, float]:
    """Cut a dense update to the factors of a rank that minimise tr((D - D') S (D - D')^T).

    With U the leading eigenvectors of D S D^T the minimiser is U U^T D (reduced-rank regression): for S = I the usual cut.

    Args:
        D: The update, float64.
        DS: D times the inputs' second moment.
        rank: At least 1.

    Returns:
        Float32 factors on the CPU, and the share of tr(D S D^T) that is lost.

    Cost: one eigen-decomposition of (out, out).
    Source: Izenman, Journal of Multivariate Analysis 5 (1975), 248-264.
    """
    gram = DS @ D.T
    U, lost = _leading((gram + gram.T) / 2, rank)
    return _balanced(U.T @ D, U), lost


def cut_dense(D: Float[Tensor, "out in"], S: Float[Tensor, "in in"], rank: int) -> tuple[LoraFactors, float]:
    """Cut as `cut_solution` does, from S itself and on the shorter side of D.

    With S = L L^T, u_i = D L v_i / s_i are the eigenvectors of D S D^T, where v_i are those of L^T D^T D L.

    Args:
        D: The update, float64.
        S: The inputs' second moment, float64, up to a factor.
        rank: At least 1.

    Cost: one product with S and one eigen-decomposition of the shorter side; where that is the inputs', two.
    """
    if D.shape[0] <= D.shape[1]:
        return cut_solution(D, D @ S, rank)
    values, vectors = in_one_thread(torch.linalg.eigh, S)
    seen = D @ (vectors * values.clamp(min=0.0).sqrt())
    V, lost = _leading(seen.T @ seen, rank)
    U = in_one_thread(torch.linalg.qr, seen @ V)[0]
    return _balanced(U.T @ D, U), lost


def cut_factors(factors: LoraFactors, S: Float[Tensor, "in in"], rank: int) -> tuple[LoraFactors, float]:
    """Cut factors as `cut_solution` does a dense update, without forming one.

    Args:
        factors: Of any rank; a rank not below it changes nothing.
        S: The inputs' second moment, up to a factor.
        rank: At least 1.

    Returns:
        Float32 factors on the CPU, and the share of tr(D S D^T) that is lost.

    Cost: a thin QR of B, one product with S, one eigen-decomposition of (R, R).
    """
    f = factors.folded(torch.float64)
    if rank >= f.rank:
        return LoraFactors(f.A.float(), f.B.float(), 1.0, f.kind), 0.0
    Q, T = in_one_thread(torch.linalg.qr, f.B)
    seen = f.A @ S.to(f.A) @ f.A.T
    gram = T @ seen @ T.T
    U, lost = _leading((gram + gram.T) / 2, rank)
    return _balanced(U.T @ T @ f.A, Q @ U, f.kind), lost


def _leading(gram: Float[Tensor, "n n"], rank: int) -> tuple[Float[Tensor, "n k"], float]:
    values, vectors = in_one_thread(torch.linalg.eigh, gram)
    values = values.clamp(min=0.0)
    total = float(values.sum())
    lost = float(values[: max(0, len(values) - rank)].sum()) / total if total > 0 else 0.0
    return vectors[:, -rank:], lost


def _balanced(A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], kind: str = LINEAR) -> LoraFactors:
    """Float32 factors of B A whose rows and columns have equal norms; B's columns have norm 1."""
    root = A.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return LoraFactors((A / root[:, None]).float().cpu(), (B * root).float().cpu(), 1.0, kind)
