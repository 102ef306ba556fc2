"""Encoded rows of several tasks on the device, and which of them each step of a fleet takes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plait.tasks.task import IGNORED

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RowBank:
    """All rows, padded on the right into one tensor per key.

    Args:
        inputs: Key -> (rows, length) integers: input_ids, attention_mask and what else the tokenizer returns.
        labels: (rows,) class ids, (rows,) float targets or (rows, target length) token ids.
        lengths: (rows,) tokens of each row, on the host: no step waits for the device.
        label_lengths: (rows,) label tokens of each row, for text.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    lengths: npt.NDArray[np.int64]
    label_lengths: npt.NDArray[np.int64]

    def take(self, rows: Tensor, length: int, label_length: int) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs cut to `length`, and labels, of the rows at these positions (on the device)."""
        inputs = {k: v[:, :length].index_select(0, rows).long() for k, v in self.inputs.items()}
        labels = self.labels.index_select(0, rows)
        return inputs, labels[:, :label_length] if labels.ndim == 2 else labels


def row_bank(rows: Sequence[Row], pad: int, kind: str, device: torch.device) -> RowBank:
    """Put encoded rows on the device.

    For causal rows the labels become pairs (position, token): the loss, and so the output layer, looks only at the
    positions whose next token is labelled.
    """
    fills = {"input_ids": pad}
    keys = [k for k in rows[0] if k != "labels"]
    inputs = {k: _padded([r[k] for r in rows], fills.get(k, 0), torch.int32).to(device) for k in keys}
    lengths = np.array([len(r["input_ids"]) for r in rows], np.int64)
    label_lengths = np.ones(len(rows), np.int64)
    if kind == "causal":
        pairs = [[(i - 1) << 32 | t for i, t in enumerate(r["labels"]) if t != IGNORED and i > 0] for r in rows]
        labels = _padded(pairs, -1, torch.int64)
        label_lengths = np.array([len(p) for p in pairs], np.int64)
    elif kind == "seq2seq":
        labels = _padded([r["labels"] for r in rows], IGNORED, torch.int64)
        label_lengths = np.array([len(r["labels"]) for r in rows], np.int64)
    else:
        labels = torch.tensor([float(r["labels"]) for r in rows], dtype=torch.float64)
    return RowBank(inputs, labels.to(device), lengths, label_lengths)


def causal_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and next tokens (ignored where there is none) from the packed labels of causal rows."""
    tokens = torch.where(labels >= 0, labels & 0xFFFFFFFF, IGNORED)
    return (labels >> 32).clamp(min=0), tokens


def _padded(lists: Sequence[Sequence[int]], fill: int, dtype: torch.dtype) -> Tensor:
    width = max(1, *(len(x) for x in lists)) if len(lists) > 1 else max(1, len(lists[0]))
    full = np.full((len(lists), width), fill, np.int64)
    for i, x in enumerate(lists):
        full[i, : len(x)] = x
    return torch.from_numpy(full).to(dtype)


@dataclass(frozen=True, slots=True)
class Pass:
    """A part of one step: the same number of rows of every member, at one length.

    Args:
        first, last: Which of each member's rows of the step, longest last.
        length: Tokens they are padded to.
        label_length: Label tokens they are padded to.
    """

    first: int
    last: int
    length: int
    label_length: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a fleet's steps take.

    Args:
        rows: (steps, members, batch) positions in the bank, each member's rows of a step sorted by length.
        passes: For each step, its parts: splitting a step by length saves pads and changes no gradient, which is a
            sum over rows.
    """

    rows: Tensor
    passes: Sequence[Sequence[Pass]]


@dataclass(frozen=True, slots=True)
class Prices:
    """What a pass of the base costs, in tokens.

    Args:
        floor: A pass with fewer tokens takes as long as one with so many: launching its kernels is what takes the time.
        cap: Tokens that a pass may have, by memory.
    """

    floor: int = 1
    cap: int = 1 << 40


def step_plan(
    bank: RowBank,
    rows: npt.NDArray[np.int64],
    device: torch.device,
    prices: Prices | None = None,
    *,
    multiple: int = 1,
) -> StepPlan:
    """Plan the passes of each step so that they cost least.

    Args:
        bank: The rows.
        rows: (steps, members, batch) positions in the bank.
        device: Where the fleet runs.
        prices: What a pass costs.
        multiple: Lengths are rounded up to it.
    """
    batch = rows.shape[2]
    rows, lengths = sorted_by_length(bank, rows, multiple)
    label_lengths = bank.label_lengths[rows].max(axis=1)
    starts, _ = cheapest_cuts(lengths, rows.shape[1], prices or Prices())
    passes = [
        [Pass(i, j, int(lengths[s, j - 1]), int(label_lengths[s, i:j].max())) for i, j in _segments(starts[s], batch)]
        for s in range(len(rows))
    ]
    return StepPlan(torch.from_numpy(rows).to(device), passes)


def sorted_by_length(
    bank: RowBank, rows: npt.NDArray[np.int64], multiple: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each member's rows of a step from short to long, and (steps, batch) the longest at each place over members."""
    order = np.argsort(bank.lengths[rows], axis=2, kind="stable")
    rows = np.take_along_axis(rows, order, axis=2)
    return rows, -(-bank.lengths[rows].max(axis=1) // multiple) * multiple


def cheapest_cuts(
    lengths: npt.NDArray[np.int64], members: int, prices: Prices
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Find the cheapest split of each step's sorted rows into passes, by dynamic programming over its ends.

    Returns:
        (steps, batch + 1) where the last pass of the cheapest split of rows 0..j starts, and its price.
    """
    steps, batch = lengths.shape
    best = np.full((steps, batch + 1), np.inf)
    best[:, 0] = 0.0
    start = np.zeros((steps, batch + 1), np.int64)
    for j in range(1, batch + 1):
        rows = j - np.arange(j)  # of a pass that ends at j and starts at 0, 1, ..., j - 1
        tokens = members * rows * lengths[:, j - 1 : j]
        price = best[:, :j] + np.maximum(tokens, prices.floor)
        price[(tokens > prices.cap) & (rows > 1)] = np.inf
        start[:, j] = price.argmin(1)
        best[:, j] = price.min(1)
    return start, best


def _segments(start: npt.NDArray[np.int64], batch: int) -> list[tuple[int, int]]:
    cuts: list[tuple[int, int]] = []
    j = batch
    while j > 0:
        cuts.insert(0, (int(start[j]), j))
        j = int(start[j])
    return cuts
