"""What members that were stepped together end with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from plait.adapters.lora import Adapter
from plait.border.counts import plural


@dataclass(slots=True)
class Outcome:
    """What the members of a batch end with.

    Args:
        order: Members, by their number in the group, as they stand in the batch.
        adapters: One for each.
        losses: (steps, members).
        failed: Whether a member's loss left the numbers.
        snapshots: Place -> step -> adapter.
        root: Where its checkpoints are.
    """

    order: list[int]
    adapters: list[Adapter]
    losses: np.ndarray[Any, np.dtype[np.float32]]
    failed: list[bool]
    snapshots: dict[int, dict[int, Adapter]] = field(default_factory=dict)
    root: Path | None = None

    def curve(self, place: int) -> list[tuple[int, float]]:
        """Summarise the losses: about twenty of (step, mean loss since the one before)."""
        every = max(1, len(self.losses) // 20)
        ends = sorted({1, *range(every, len(self.losses) + 1, every), len(self.losses)})
        starts = [0, *ends[:-1]]
        return [(e, float(self.losses[s:e, place].mean())) for s, e in zip(starts, ends, strict=True)]

    def why(self, place: int) -> str:
        """Say what happened to a member that failed."""
        losses = self.losses[:, place]
        lost = np.flatnonzero(~np.isfinite(losses))
        if len(lost) == 0:
            return f"the weights became NaN or infinite in the last of {plural(len(losses), 'step')}"
        return f"the loss became {losses[lost[0]]} at step {lost[0] + 1} of {len(losses)}"

    def forget(self) -> None:
        """Remove the checkpoints, once the members are written."""
        if self.root is not None:
            shutil.rmtree(self.root, ignore_errors=True)
