"""What the layers of a model put out, kept of every adapter on its own texts, for a merge to come close to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Bytes of hidden states that are kept, of all adapters together: of deeper models or more texts fewer layers are looked at.
KEPT_BYTES = {"cuda": 4 << 30, "cpu": 1 << 30}
# A layer that the adapter moves by less than this share of its own size says nothing: what differs is rounding.
_LEAST_MOVED = 1e-8


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what each layer puts out within the block, (rows, length, width), in the order in which they run.

    Of encoder-decoder models nothing is collected: two kinds of padding would have to be told apart.
    """
    states: list[Tensor] = []

    def keep(_: nn.Module, inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in _layers(model)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: Any) -> list[nn.Module]:
    """The members of the model's lists of modules that lie in no other list."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [layer for one in outer for layer in one]


def spread(layers: int, room: int) -> list[int]:
    """Choose layers at equal distances, the last among them; none where there is room for none.

    >>> spread(12, 4), spread(6, 9), spread(6, 0)
    ([2, 5, 8, 11], [0, 1, 2, 3, 4, 5], [])
    """
    many = min(layers, room)
    return [round((i + 1) * layers / many) - 1 for i in range(many)]


@dataclass(frozen=True, slots=True)
class LayerTargets:
    """Hidden states of one adapter on its own texts.

    Args:
        layers: Which layers, counted from 0.
        states: A text's (positions, layers, width), in 16 bits.
        rooms: (layers,) mean squared distance of the bare base's from them; infinite where the adapter moves nothing.
    """

    layers: Sequence[int]
    states: Sequence[Tensor]
    rooms: Tensor

    def loss(self, rows: Sequence[int], states: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Average over layers |h_merged - h_adapter|^2 / |h_base - h_adapter|^2: 0 for the adapter itself, 1 for the bare base.

        Args:
            rows: The texts.
            states: Every layer's, of these texts: what `watched` collected.
            mask: (texts, length) positions that count.
        """
        wanted = torch.cat([self.states[i] for i in rows])
        merged = torch.stack([states[i][mask] for i in self.layers], 1)
        off = (merged.float() - wanted.float()).square().sum(-1).mean(0)
        return (off / self.rooms).mean()


class LayerCollector:
    """Collects the states of one adapter, and how far the bare base is from them, batch by batch.

    Args:
        layers: Which layers.
        texts: How many texts there are.
    """

    def __init__(self, layers: Sequence[int], texts: int) -> None:
        self.layers, self.states = layers, [torch.empty(0, dtype=torch.float16)] * texts
        self._off: list[Tensor] = []
        self._size: list[Tensor] = []
        self._positions = 0

    def add(self, rows: Sequence[int], own: Sequence[Tensor], bare: Sequence[Tensor], mask: Tensor) -> None:
        """Take a batch: its texts, what the adapter's and the base's layers put out, and which positions count."""
        mine, other = (torch.stack([states[i][mask] for i in self.layers], 1) for states in (own, bare))
        self._off.append((mine.float() - other.float()).square().sum(-1).sum(0))
        self._size.append(mine.float().square().sum(-1).sum(0))
        self._positions += len(mine)
        small = mine.to(torch.bfloat16 if mine.dtype == torch.bfloat16 else torch.float16)
        for i, part in zip(rows, torch.split(small, mask.sum(1).tolist()), strict=True):
            self.states[i] = part.clone()

    @property
    def targets(self) -> LayerTargets:
        """What was collected."""
        off, size = torch.stack(self._off).sum(0), torch.stack(self._size).sum(0)
        rooms = torch.where(off > _LEAST_MOVED * size, off / self._positions, torch.inf)
        return LayerTargets(self.layers, self.states, rooms)


def layers_to_keep(states: Sequence[Tensor], positions: int) -> list[int]:
    """Choose the layers whose states there is room for.

    Args:
        states: What one pass puts out, layer by layer.
        positions: How many positions of all texts count, of all adapters together.
    """
    if not states:
        return []
    room = KEPT_BYTES.get(states[0].device.type, KEPT_BYTES["cuda"])
    return spread(len(states), room // (2 * max(1, positions) * states[0].shape[-1]))
