"""Which positions of a batch are real tokens, for every place a module may stand in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from plait.errors import RunError

MAIN, DECODER = "main", "decoder"


@dataclass(frozen=True, slots=True)
class Positions:
    """The real positions of one (examples, length) grid.

    Args:
        examples, length: Sizes of the grid.
        index: (n,) flat positions that are real, or None where all are.
        example: (n,) example of each real position, on the CPU.
    """

    examples: int
    length: int
    index: Int[Tensor, " n"] | None
    example: Int[Tensor, " n"]

    @classmethod
    def of(cls, mask: Bool[Tensor, "b l"], device: torch.device) -> Positions:
        """From a mask on the CPU: the GPU never has to be waited for."""
        examples, length = mask.shape
        index = mask.flatten().nonzero().squeeze(1)
        example = index // length
        every = index.numel() == mask.numel()
        return cls(examples, length, None if every else sent(index, device), example)

    @property
    def count(self) -> int:
        """Number of real positions."""
        return self.example.shape[0]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a tensor to a device; from the CPU to a GPU by way of pinned memory, for which nobody waits."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class BatchMasks:
    """The masks of one batch: the encoder's (or only) one and the decoder's.

    A decoder without a mask of its own reads its inputs shifted right by one, so its mask is the shifted mask of the
    labels or of the inputs, with the start token real.
    """

    def __init__(self, batch: Mapping[str, Any], config: Any, device: torch.device) -> None:
        main = batch.get("attention_mask")
        self._known: dict[str, Positions] = {}
        self.device = device
        if isinstance(main, Tensor):
            if main.ndim != 2:
                raise RunError(
                    f"the attention_mask is {tuple(main.shape)}, expected (examples, length): it does not tell which tokens are pads",
                    hint="batches of single texts with their plain mask",
                )
            self._known[MAIN] = Positions.of(main.bool().cpu(), device)
        if getattr(config, "is_encoder_decoder", False):
            mask = _decoder_mask(batch, getattr(config, "pad_token_id", None))
            if mask is not None:
                self._known[DECODER] = Positions.of(mask.cpu(), device)

    def fit(self, shape: torch.Size, role: str, module: str) -> Positions:
        """Find the real positions of a module's input.

        Args:
            shape: Shape of the input: (examples, length, d), or (n, d) where positions are flattened or pooled.
            role: "main" or "decoder".
            module: For the message.

        Raises:
            RunError: A mask is there and its shape is neither that of the input nor a pooled or packed form of it.
        """
        positions = self._known.get(role)
        grid = tuple(shape[:-1])
        if positions is None:
            return self._all(grid)
        if grid in ((positions.examples, positions.length), (positions.examples * positions.length,)):
            return positions
        if grid in ((positions.examples,), (positions.examples, 1)):  # pooled: one input per example
            return self._all((positions.examples, 1))
        if grid == (positions.count,):  # packed: pads were taken out by the model
            return Positions(positions.examples, positions.length, None, positions.example)
        if len(grid) == 2 and grid[0] == 1:  # one input for all examples, such as DeBERTa's relative positions
            return self._all(grid)
        raise RunError(
            f"reads {tuple(shape)}, which the mask {(positions.examples, positions.length)} does not fit", where=module
        )

    def tokens(self) -> int | None:
        """Real tokens of the batch, encoder and decoder together; None without masks."""
        return sum(p.count for p in self._known.values()) if self._known else None

    def _all(self, grid: tuple[int, ...]) -> Positions:
        return Positions.of(torch.ones((grid[0], max(1, _product(grid[1:]))), dtype=torch.bool), self.device)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _decoder_mask(batch: Mapping[str, Any], pad: int | None) -> Bool[Tensor, "b l"] | None:
    given = batch.get("decoder_attention_mask")
    if isinstance(given, Tensor):
        return given.bool()
    ids = batch.get("decoder_input_ids")
    if isinstance(ids, Tensor):
        mask = ids != pad if pad is not None else torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = True  # T5 starts its decoder with the pad token
        return mask
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        return _shifted(labels != -100)
    main = batch.get("attention_mask")
    return _shifted(main.bool()) if isinstance(main, Tensor) and main.ndim == 2 else None


def _shifted(mask: Bool[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)
