"""Token ids of several lengths as one tensor, padded on the side that a pass wants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def right_padded(lists: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad lists on the right: (n, longest) ids and (n,) lengths.

    >>> ids, lengths = right_padded([[5, 6], [7]], 0, torch.device("cpu"))
    >>> ids.tolist(), lengths.tolist()
    ([[5, 6], [7, 0]], [2, 1])
    """
    width = max(map(len, lists))
    ids = torch.tensor([[*x, *[pad] * (width - len(x))] for x in lists], dtype=torch.int64, device=device)
    return ids, torch.tensor([len(x) for x in lists], dtype=torch.int64, device=device)


def masked_right(lists: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad lists on the right, as encoders are trained: (n, longest) ids and their mask.

    Pads on the left would move every absolute position, such as BART's, by as many places as other rows are longer.
    """
    ids, lengths = right_padded(lists, pad, device)
    return ids, (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()


def left_padded(lists: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids on the left, so that all end at one place.

    Returns:
        (n, longest) ids and their mask.
    """
    width = max(map(len, lists))
    ids = torch.tensor([[*[pad] * (width - len(x)), *x] for x in lists], dtype=torch.int64, device=device)
    mask = torch.tensor([[*[0] * (width - len(x)), *[1] * len(x)] for x in lists], dtype=torch.int64, device=device)
    return ids, mask
