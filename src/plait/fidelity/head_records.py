"""What is recorded of heads that follow a merge: fitted in closed form, or learnt together with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadRefit:
    """A head's last layer fitted to the merged model.

    Args:
        task: Name of the head.
        before, after: KL from the adapter's answers on the texts held out, with the head as it was and fitted.
        kept: Whether the fitted one is closer, and within the limit on general text, and so was taken.
        strength: How strongly it was held where it was.
    """

    task: str
    before: float
    after: float
    kept: bool
    strength: float


@dataclass(frozen=True, slots=True)
class HeadsLearnt:
    """Heads learnt together with the merge's weights.

    Args:
        steps: How many.
        held_out: "merge", "fitted" (with heads fitted in closed form) and "learnt" -> what each keeps on the texts held out.
        kept: Whether the learnt ones were the closest there, and within the limit on general text, and so were taken.
    """

    steps: int
    held_out: Mapping[str, float]
    kept: bool

    @property
    def closer(self) -> bool:
        """Whether the learnt ones were the closest on the texts held out."""
        return self.held_out["learnt"] > max(self.held_out["merge"], self.held_out["fitted"])
