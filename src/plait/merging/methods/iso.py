"""Isotropic merging: the sum's singular vectors, all with one singular value."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.merging.factors import factors_of
from plait.merging.inputs import MergeInputs
from plait.merging.registry import merge_method
from plait.merging.spectra.core import polar, significant
from plait.merging.spectra.small_svd import thin_svd
from plait.merging.spectra.sum_svd import svd_of_sum
from plait.options import Fraction


@merge_method("iso_c", paper="arXiv:2502.04959", stacks=True)
def iso_c(x: MergeInputs) -> LoraFactors:
    """The weighted sum U S V^T with every singular value replaced by their mean.

    Cost: one eigendecomposition of (R, R), see `svd_of_sum`.
    Source: Marczak et al., ICML 2025, algorithm 1.
    **Deviates**: the mean is over the sum's nonzero singular values (at most R), and only their directions get it. The
    authors average over all min(out, in), most of which are zero for a LoRA, and give that value to the vectors of the
    zeros too, which are arbitrary. On the sum's own span theirs is this result times R / min(out, in).
    """
    if x.total_rank == 0:
        return x.zero()
    U, S, V = svd_of_sum(x)
    k = significant(S)
    if k == 0:
        return x.zero()
    root = S[..., :k].mean(-1, keepdim=True).sqrt()
    return factors_of(V.first(k).columns(root).mT, U.first(k).columns(root), x.kind)


@merge_method("iso_cts", paper="arXiv:2502.04959")
def iso_cts(x: MergeInputs, *, common: Fraction = 0.8) -> LoraFactors:
    """Iso-C with part of the directions taken from what the sum misses of each task.

    Of R directions, the sum's top ones span a common space; the rest, the same number for each task, are the top
    singular vectors of D_t minus its part in the common left space. All are made orthogonal together (polar factors)
    and get the mean of their singular values.

    Args:
        x: The module.
        common: Fraction of the R directions that the sum supplies.

    Cost: T + 3 SVDs of (R, R) in the lossless core.
    Source: Marczak et al., ICML 2025, algorithm 2.
    **Deviates**: R directions in place of min(out, in), as in `iso_c`; directions without energy are left out.
    """
    core, tasks = x.core, sum(1 for rank in x.ranks if rank)
    U, S, Vt = thin_svd(core.combination(x.weights))
    total = min(x.total_rank, len(S))
    if tasks == 0 or significant(S) == 0:
        return x.zero()
    own = round((total - int(total * common)) / tasks)
    k = max(0, min(total - own * tasks, significant(S)))
    lefts, values, rights = [U[:, :k]], [S[:k]], [Vt[:k].T]
    for t in (t for t, rank in enumerate(x.ranks) if rank):
        part = core.part(t) * x.weights[t]
        u, s, v = torch.linalg.svd(part - U[:, :k] @ (U[:, :k].T @ part), full_matrices=False)
        n = min(own, significant(s, 1e-6) if s[:1] > 1e-6 * S[0] else 0)
        lefts, values, rights = [*lefts, u[:, :n]], [*values, s[:n]], [*rights, v[:n].T]
    return _with_one_value(x, polar(torch.cat(lefts, dim=1)), polar(torch.cat(rights, dim=1)), torch.cat(values))


def _with_one_value(x: MergeInputs, U: Tensor, V: Tensor, S: Tensor) -> LoraFactors:
    root = S.mean(-1).sqrt()[..., None, None]
    return x.core.lifted(U * root, V.mT * root, x.kind)
