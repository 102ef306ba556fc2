"""Components of the base's weights that the others' inputs use least: context-oriented decomposition's start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.one_thread import in_one_thread
from plait.errors import InputError, UsageError
from plait.options import Positive
from plait.subspaces.inputs import Basis, SiteInputs
from plait.subspaces.registry import subspace_method
from plait.subspaces.solvers import orthonormal_rows


@subspace_method("corda", paper="arXiv:2406.05223", needs=("moments", "others", "weights"))
def corda(x: SiteInputs, *, damp: Positive = 0.01) -> Mapping[str, Basis]:
    """Span the r components of W C with the smallest singular values, C the others' second moment (a control).

    With U S V^T = W C the base is W = U S (V^T C^-1), and the rows v^T C^-1 of the smallest singular values are the
    components that carry least of what W answers to the others' inputs. The others stand for the knowledge to preserve.

    Args:
        x: One module of all tasks, with its weight.
        damp: Added to C's diagonal, in units of its mean.

    Returns:
        The components orthonormalised, those of the smallest singular values first; energies are the singular values.

    Raises:
        UsageError: No weights were given.
        InputError: The module has fewer than r outputs or inputs.

    Cost: one SVD of (out, d) and one Cholesky of (d, d) per module and task.

    Source: arXiv:2406.05223, section 3, knowledge-preserved adaptation; github.com/iboing/CorDA, cordalib/decomposition.py.
    **Deviates**: of their start only the span of A is taken. B is 0 and the base is untouched, where they start at B A = the
    components themselves and take these off the base: adapters that share a base can be merged, theirs each have another. So
    training does not go on from the base's own part, and rows have one length instead of the roots of S. C is the
    mean of the other tasks' moments (and of a background, where there is one) instead of one of question answering; of tokens,
    trace-normalised, where they scale each text by its largest entry. In float64 `damp` is never doubled. The
    instruction-previewed mode (the largest components, C of the task itself) is left out.
    """
    if x.base_weight is None:
        raise UsageError("corda reads the base's weights, and none were given", where=x.name)
    W = x.base_weight.to(x.device, torch.float64)
    if min(W.shape) < x.rank:
        raise InputError(
            f"rank {x.rank} of a weight {tuple(W.shape)}", where=x.name, hint="a rank no larger than either side"
        )
    return {task: _corda_one(W, x.others(task), x.rank, damp) for task in x.tasks}


def _corda_one(W: Float[Tensor, "out d"], C: Float[Tensor, "d d"], rank: int, damp: float) -> Basis:
    C.diagonal().add_(damp * float(C.diagonal().mean()))
    _, S, Vt = in_one_thread(torch.linalg.svd, W @ C, full_matrices=False)
    smallest = in_one_thread(torch.linalg.solve, C, Vt[-rank:].flip(0).T)  # C is symmetric: (v^T C^-1)^T = C^-1 v
    return Basis(orthonormal_rows(smallest), S[-rank:].flip(0), {"solver": "svd"})
