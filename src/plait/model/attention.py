"""Fused attention for models whose own code writes it out."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_CLASSES_WITH_THEIR_OWN_ATTENTION = ("MPNetSelfAttention",)
# Functions of transformers that read a mask's values on the host to see whether it hides anything.
_MASK_READERS = ("_ignore_bidirectional_mask_sdpa", "_ignore_causal_mask_sdpa")


@contextlib.contextmanager
def fused_attention(backbone: nn.Module) -> Iterator[None]:
    """Within the block, attention runs as one fused operation, in evaluation mode.

    MPNet's, which its own code writes out, is replaced by one that is the same to rounding: the relative position bias
    and the mask are added up once a pass, and given to the operation as its mask. For every model cuDNN's kernels are
    left out: they build a plan for each new shape, a tenth of a second each, and here every pass has another shape. On
    a GPU masks are made without asking whether they hide anything: the answer would keep the host waiting for the device
    once a pass, and the device then for the host.
    """
    attentions = [m for m in backbone.modules() if type(m).__name__ in _CLASSES_WITH_THEIR_OWN_ATTENTION]
    bias = _SharedBias()
    for module in attentions:
        module.forward = _fused(module, bias)
    try:
        with sdpa_kernel(_KERNELS), _masks_always(next(backbone.parameters()).device.type):
            yield
    finally:
        for module in attentions:
            del module.forward  # the instance's; the class's own is seen again


@contextlib.contextmanager
def _masks_always(device: str) -> Iterator[None]:
    """Within the block, padded batches get their mask written out, whatever it holds; on the CPU nothing changes."""
    from transformers import masking_utils

    known = {n: getattr(masking_utils, n) for n in _MASK_READERS if device != "cpu" and hasattr(masking_utils, n)}
    for name, function in known.items():
        setattr(masking_utils, name, _unless_padded(function))
    try:
        yield
    finally:
        for name, function in known.items():
            setattr(masking_utils, name, function)


def _unless_padded(function: Callable[..., bool]) -> Callable[..., bool]:
    def ignored(padding_mask: Tensor | None, *args: Any, **options: Any) -> bool:
        return padding_mask is None and function(padding_mask, *args, **options)

    return ignored


class _SharedBias:
    """The sum of position bias and mask, made once for all layers of a pass."""

    def __init__(self) -> None:
        self._parts: tuple[Tensor | None, Tensor | None] = None, None
        self._sum: Tensor | None = None

    def __call__(self, position: Tensor | None, mask: Tensor | None, like: Tensor) -> Tensor | None:
        if self._sum is None or self._parts[0] is not position or self._parts[1] is not mask:
            parts = [p.to(like.dtype) for p in (position, mask) if p is not None]
            self._parts = position, mask
            self._sum = parts[0] + parts[1] if len(parts) == 2 else (parts[0] if parts else None)
        return self._sum


def _fused(module: Any, bias: _SharedBias) -> Callable[..., tuple[Tensor]]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]

    def forward(*args: Any, **options: Any) -> tuple[Tensor]:
        given = dict(zip(names, args, strict=False)) | options
        hidden: Tensor = given["hidden_states"]
        heads = (*hidden.shape[:-1], -1, module.attention_head_size)
        q, k, v = (part(hidden).view(heads).transpose(1, 2) for part in (module.q, module.k, module.v))
        added = bias(given.get("position_bias"), given.get("attention_mask"), q)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=added)
        return (module.o(mixed.transpose(1, 2).reshape(*hidden.shape[:-1], module.all_head_size)),)

    return forward
