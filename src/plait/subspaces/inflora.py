"""Directions outside those that hold most of what the others use: interference-free LoRA's start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.one_thread import in_one_thread
from plait.border.counts import plural
from plait.errors import InputError
from plait.options import Fraction
from plait.subspaces.contrastive import largest_pairs, solver_record
from plait.subspaces.inputs import Basis, SiteInputs
from plait.subspaces.registry import subspace_method
from plait.subspaces.solvers import orthonormal_rows


@subspace_method("inflora", paper="arXiv:2404.00228", needs=("moments", "own", "others"))
def inflora(x: SiteInputs, *, threshold: Fraction = 0.95) -> Mapping[str, Basis]:
    """Find the r directions of most own energy outside the fewest that hold a share of the others' energy (a control).

    With M the k leading eigenvectors of the others' second moment, k the least whose eigenvalues are `threshold` of the
    trace, the rows are the leading eigenvectors of (I - M M^T) m_t (I - M M^T): an update B A reads of the others' inputs no
    more than the 1 - threshold that M leaves out, and what it reads of the own ones is the most there is.

    Args:
        x: One site of all tasks.
        threshold: Share of the others' energy that is projected out, in [0, 1]; 0 leaves one direction out.

    Returns:
        Orthonormal rows, orthogonal to M; energies a m_t a^T, largest first. The record says how many directions were
        `projected` out.

    Raises:
        InputError: The own inputs reach fewer than r directions outside M.

    Cost: one full eigendecomposition of (d, d) per site and task, and some 20 products of d x d with 16 columns.

    Source: arXiv:2404.00228, sections 3.2 and 3.3; github.com/liangyanshuo/InfLoRA, methods/inflora.py. **Deviates**: tasks come all at
    once, so that M is of the mean of all others, where theirs grows task by task by those that came before, with a threshold that rises
    to 1; DualGPM, which keeps M's complement where that is smaller, is left out. Energies are eigenvalues of the second moment, as
    the paper's singular values of the inputs have them; the code counts the squares of these eigenvalues, stops one
    direction earlier, and projects on one side only. The moments are of tokens, trace-normalised, from a sample before training. A's
    rows have length 1 where theirs have 1 / sqrt(3) (`row_norm: 0.577`), and A is trained too unless
    `constraint: frozen` holds it: without that the guarantee is of the start alone.
    """
    return {task: _inflora_one(x, task, threshold) for task in x.tasks}


def _inflora_one(x: SiteInputs, task: str, threshold: float) -> Basis:
    M = leading(x.others(task), threshold)
    own = _outside(x.own(task), M)
    pairs = largest_pairs(x, lambda Y, _: own @ Y, lambda: own[None], 1)
    top = pairs.vectors[0, :, : x.rank]
    rows = orthonormal_rows(top - M @ (M.T @ top))  # what the iteration left inside M would be read of the others
    energies = ((rows @ own) * rows).sum(1)
    if float(energies.min()) <= x.resolution([task]):
        raise InputError(
            f"the inputs of task {task!r} reach fewer than {plural(x.rank, 'direction')} outside the {M.shape[1]} of the others",
            where=x.name,
            hint="a lower threshold, a lower rank, or more samples",
        )
    return Basis(rows, energies, {**solver_record(pairs), "projected": M.shape[1]})


def leading(m: Float[Tensor, "d d"], threshold: float) -> Float[Tensor, "d k"]:
    """Find the fewest leading eigenvectors whose eigenvalues add up to a share of the trace; one at least.

    >>> leading(torch.diag(torch.tensor([1.0, 6.0, 3.0])), 0.9).abs().tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    values, vectors = in_one_thread(torch.linalg.eigh, m)
    shares = values.flip(0).clamp_min(0).cumsum(0)
    count = 1 + int((shares[:-1] < threshold * shares[-1]).sum())
    largest: Tensor = vectors.flip(1)[:, :count]
    return largest


def _outside(m: Float[Tensor, "d d"], M: Float[Tensor, "d k"]) -> Float[Tensor, "d d"]:
    """(I - M M^T) m (I - M M^T)."""
    m = m - M @ (M.T @ m)
    m = m - (m @ M) @ M.T
    return 0.5 * (m + m.T)  # symmetric to the bit
