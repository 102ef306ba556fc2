"""What a live layer is, of whatever make."""

from __future__ import annotations

from torch import nn


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Give (out, in) of a linear layer of any make: plain, quantised, or transformers' Conv1D.

    >>> linear_shape(nn.Linear(in_features=3, out_features=2))
    (2, 3)
    """
    for out, width in (("out_features", "in_features"), ("nf", "nx")):
        shape = getattr(module, out, None), getattr(module, width, None)
        if isinstance(shape[0], int) and isinstance(shape[1], int):
            return shape[0], shape[1]
    return None


def stored_flipped(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as (in, out), as transformers' Conv1D does; by its kind, since it may be square."""
    return not hasattr(module, "out_features")
