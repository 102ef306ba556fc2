"""Slow float64 twins of the neighbours' starts, in NumPy, from the papers' own words: inputs and weights, not moments."""

from __future__ import annotations

import numpy as np


def inflora(own, others, rank, threshold):
    """Rows of A, and the projector on the space of the others.

    The others' inputs, each task's of Frobenius norm 1, stand beside one another; its leading left singular vectors until
    their squared singular values hold the threshold are the old tasks' space M. What the own inputs are outside of it has
    the rows of A as its leading left singular vectors.
    """
    R = np.concatenate([h.T / np.linalg.norm(h) for h in others], axis=1)
    U, S, _ = np.linalg.svd(R, full_matrices=False)
    held, k = 0.0, 0
    while held < threshold * (S**2).sum():
        held, k = held + S[k] ** 2, k + 1
    M = U[:, : max(k, 1)]
    H = own.T / np.linalg.norm(own)
    U, S, _ = np.linalg.svd(H - M @ M.T @ H, full_matrices=False)
    return U[:, :rank].T, M @ M.T, S[:rank] ** 2


def corda(W, others, rank, damp):
    """(U, S, V^T C^-1) of W C, the r components of the smallest singular values last; W is their sum over all components."""
    C = np.mean([h.T @ h / np.linalg.norm(h) ** 2 for h in others], axis=0)
    C = C + damp * np.mean(np.diag(C)) * np.eye(len(C))
    U, S, Vt = np.linalg.svd(W @ C, full_matrices=False)
    V = Vt @ np.linalg.inv(C)
    return (U[:, :-rank], S[:-rank], V[:-rank]), (U[:, -rank:], S[-rank:], V[-rank:])
