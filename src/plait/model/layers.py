"""What a live layer is, of whatever make."""

from __future__ import annotations

from torch import nn


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer of any make: plain, quantised, or transformers' Conv1D."""
    for out, width in (("out_features", "in_features"), ("nf", "nx")):
        found = getattr(module, out, None), getattr(module, width, None)
        if isinstance(found[0], int) and isinstance(found[1], int):
            return found[0], found[1]
    return None
