"""What adapters and merges answered to which texts, so that no text is read twice by one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from plait.adapters.lora import Adapter

# Text -> (classes,) logits
Rows = dict[tuple[str, ...], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Answers:
    """Logits of headed tasks, by task, adapter, scale and text."""

    _rows: dict[tuple[str, int, float], tuple[Adapter | None, Rows]] = field(default_factory=dict)

    def of(self, task: str, adapter: Adapter | None, scale: float) -> Rows:
        """Give what is known of one adapter (None for the bare base) on a task; what is added to it stays."""
        # With the adapter itself, so that no other takes its id.
        return self._rows.setdefault((task, id(adapter), scale), (adapter, {}))[1]

    def entries(self) -> Iterator[tuple[str, Adapter | None, float, Rows]]:
        """List task, adapter (None for the bare base), scale and what it answered."""
        for (task, _, scale), (adapter, rows) in self._rows.items():
            yield task, adapter, scale, rows

    def forget_others(self, adapters: Iterable[Adapter]) -> None:
        """Let go of all but the bare base and these adapters."""
        stay = {id(None), *map(id, adapters)}
        for key in [k for k in self._rows if k[1] not in stay]:
            del self._rows[key]
