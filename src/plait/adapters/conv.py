"""Convolution LoRAs as ordinary matrices: the kernel is kept in the factors' kind, so that writing restores it.

A convolution with a low-rank update is a convolution A with r output channels and the module's kernel, then one of kernel
size 1, B. Its weight update (out, in, kh, kw), flattened to (out, in * kh * kw), is exactly B (out, r) times A
(r, in * kh * kw): whatever holds for matrices holds for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.adapters.arrays import Array, NoArrayError
from plait.adapters.lora import EMBEDDING, LINEAR, LoraFactors
from plait.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_CONV = "conv:"


def conv_kind(kernel: tuple[int, ...]) -> str:
    """The kind of a module with this kernel: "conv:3x3", or "linear" where there is none."""
    return _CONV + "x".join(map(str, kernel)) if kernel else LINEAR


def kernel_of(kind: str) -> tuple[int, ...]:
    """The kernel in a kind; empty for linear modules and embeddings."""
    return tuple(int(k) for k in kind.removeprefix(_CONV).split("x")) if kind.startswith(_CONV) else ()


def stored_as(kind: str) -> str:
    """How PEFT's names tell a kind: "linear" (convolutions too) or "embedding"."""
    return EMBEDDING if kind == EMBEDDING else LINEAR


def as_matrices(A: Tensor, B: Tensor, where: str) -> tuple[Tensor, Tensor, str]:
    """Factors as they are stored -> (r, in * kernel), (out, r) and the kind.

    Args:
        A: (r, in) or (r, in, *kernel).
        B: (out, r) or (out, r, 1, ...), as many dimensions as A.
        where: Names the module in errors.

    Raises:
        InputError: Shapes of no LoRA: other numbers of dimensions, or a kernel in B.
    """
    if A.ndim != B.ndim or not 2 <= A.ndim <= 5 or any(k != 1 for k in B.shape[2:]):
        raise InputError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} are no factors: expected a floating matrix each, or a convolution and "
            "one of kernel size 1",
            where=where,
        )
    if A.ndim == 2:
        return A, B, LINEAR
    return A.reshape(A.shape[0], -1), B.reshape(B.shape[0], B.shape[1]), conv_kind(tuple(A.shape[2:]))


def refuse_groups(A: Tensor, B: Tensor, kind: str, where: str) -> None:
    """Refuse the factors of a grouped convolution by that name: there B is (out, rank / groups).

    Args:
        A: As a matrix.
        B: As a matrix.
        kind: Of the module.
        where: Names the module in errors.

    Raises:
        InputError: It is one.
    """
    rank, columns = A.shape[0], B.shape[1]
    if kernel_of(kind) and 0 < columns < rank and rank % columns == 0:
        raise InputError(
            f"{where.rpartition(': ')[2]!r} is a grouped convolution of {rank // columns} groups (A {tuple(A.shape)}, "
            f"B {tuple(B.shape)}): its update is no product of one B and one A",
            where=where,
            hint="PEFT does not merge it either: serve it as it is, or train without this module",
        )


def with_middle(A: Tensor, middle: Tensor, B: Tensor, where: str) -> Tensor:
    """A convolution's A with what a Tucker decomposition has between A and B multiplied into it: rank and B stay.

    The update is sum_pq B[o, p] M[p, q, h, w] A[q, i], so M's and A's product over q, (r, in, kh, kw), is the A of a plain
    convolution LoRA of the same update: exact, but for rounding in float32.

    Args:
        A: (r, in, 1, ...).
        middle: (r, r, *kernel).
        B: (out, r, 1, ...).
        where: Names the module in errors.

    Raises:
        InputError: Shapes of no such decomposition.

    Source: LyCORIS (Yeh et al., arXiv 2309.14859), section on convolutions.
    """
    r = A.shape[0]
    ones = all(k == 1 for t in (A, B) for k in t.shape[2:])
    if not 3 <= A.ndim == middle.ndim == B.ndim or tuple(middle.shape[:2]) != (r, r) or not ones:
        raise InputError(
            f"A {tuple(A.shape)}, middle {tuple(middle.shape)} and B {tuple(B.shape)} are no Tucker decomposition: expected "
            "(r, in, 1, 1), (r, r, height, width) and (out, r, 1, 1)",
            where=where,
        )
    if isinstance(A, Array):
        raise NoArrayError("a Tucker decomposition")
    import torch

    flat = middle.float().reshape(r, r, -1)
    product = torch.einsum("pqk,qi->pik", flat, A.float().reshape(r, -1))
    return product.reshape(r, A.shape[1], *middle.shape[2:])


def as_stored(factors: LoraFactors) -> tuple[Tensor, Tensor]:
    """A and B with the kernel's dimensions back: (r, in, *kernel) and (out, r, 1, ...)."""
    kernel = kernel_of(factors.kind)
    if not kernel:
        return factors.A, factors.B
    return factors.A.reshape(factors.rank, -1, *kernel), factors.B.reshape(*factors.B.shape, *(1 for _ in kernel))
