"""Convolution LoRAs as ordinary matrices: the kernel is kept in the factors' kind, so that writing restores it.

A convolution with a low-rank update is a convolution A with r output channels and the module's kernel, then one of kernel
size 1, B. Its weight update (out, in, kh, kw), flattened to (out, in * kh * kw), is exactly B (out, r) times A
(r, in * kh * kw): whatever holds for matrices holds for it.
"""

from __future__ import annotations

from torch import Tensor

from plait.adapters.lora import EMBEDDING, LINEAR, LoraFactors
from plait.errors import InputError

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


def as_stored(factors: LoraFactors) -> tuple[Tensor, Tensor]:
    """A and B with the kernel's dimensions back: (r, in, *kernel) and (out, r, 1, ...)."""
    kernel = kernel_of(factors.kind)
    if not kernel:
        return factors.A, factors.B
    return factors.A.reshape(factors.rank, -1, *kernel), factors.B.reshape(*factors.B.shape, *(1 for _ in kernel))
