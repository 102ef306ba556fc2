"""How many rows are longer than the tokens that a row may have: what is cut of them nobody reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plait.border.counts import agreed, plural
from plait.border.records import optional
from plait.tasks.task import TEXT_KINDS, Task

UNCUT = 1 << 20  # tokens: longer than any row, for a tokenizer that is asked not to cut
_STEP = 8  # lengths are proposed in steps of this


@dataclass(frozen=True, slots=True)
class Cut:
    """What a limit of tokens takes from rows.

    Args:
        rows: Rows that were looked at.
        cut: How many of them are longer than `limit`.
        limit: Tokens a row may have.
        longest: Tokens of the longest of them, a causal row's answer and end token included.
        answers: Of seq2seq rows, how many answers are longer than `limit`: their ends are not learnt.
        total: Rows there are; None where all were looked at.
        room: Tokens that the tokenizer says its model reads; None where it does not say.
    """

    rows: int
    cut: int
    limit: int
    longest: int
    answers: int = optional(0)
    total: int | None = optional()
    room: int | None = optional()

    def said(self, task: Task) -> str:
        """Say it in a line; "" where nothing is cut.

        >>> from plait.tasks import Source
        >>> sums = Task("gsm8k", "causal", Source("rows.csv"), ("question",))
        >>> Cut(600, 12, 128, 397).said(sums)
        '12 of 600 prompts of gsm8k are cut at 128 tokens; data.max_length: 400 would hold all'

        Args:
            task: Whose rows they are.
        """
        if not self.cut:
            return ""
        what = "texts" if task.kind not in TEXT_KINDS else "conversations" if task.chat == "messages" else "prompts"
        drawn = "" if self.total is None else f", drawn of {self.total:,},"
        some = f" ({self.answers:,} of them for their answers)" if self.answers else ""
        held = whole_length(self.longest)
        cure = f"data.max_length: {held} would hold all" + ("" if self.total is None else " of these")
        if self.room is not None and held > self.room:
            cure = f"the longest has {self.longest}, and the base reads {self.room}"
        cut = f"{agreed(self.cut, 'is', 'are')} cut at {plural(self.limit, 'token')}"
        return f"{self.cut:,} of {self.rows:,} {what} of {task.name}{drawn} {cut}{some}; {cure}"


def whole_length(tokens: int) -> int:
    """Round up to a length that is easily typed.

    >>> whole_length(397)
    400
    """
    return _STEP * math.ceil(tokens / _STEP)


def cut_of(tokenizer: Any, lengths: Sequence[int], limit: int, answers: Sequence[int] = ()) -> Cut:
    """Count what a limit cuts.

    Args:
        tokenizer: Says how many tokens its model reads.
        lengths: Tokens of every row, uncut.
        limit: Tokens a row may have.
        answers: Tokens of every answer, where they are encoded apart.
    """
    both = [max(pair) for pair in zip(lengths, answers, strict=True)] if answers else list(lengths)
    room = int(min(getattr(tokenizer, "model_max_length", UNCUT), UNCUT))
    return Cut(
        len(both), sum(n > limit for n in both), limit, max(both, default=0), sum(n > limit for n in answers),
        room=room if room < UNCUT else None,
    )  # fmt: skip
