"""What is asked of a merge, and the answers side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from plait.border.records import nested, optional
from plait.fidelity.texts import Texts
from plait.trying.inputs import Missing

OnProgress = Callable[[str], None]
BASE, ALONE, MERGE = "the bare base", "its adapter", "the merge"


@dataclass(frozen=True, slots=True)
class Prompts:
    """What is asked.

    Args:
        for_all: Texts for everybody.
        of_tasks: Task -> texts for it alone: for its head, or of a text model for its adapter; beside the base and the merge.
        notes: What a reader has to know of them.
    """

    for_all: Texts = ()
    of_tasks: Mapping[str, Texts] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Args:
        text: What was written, the name of a class, or a number.
        probability: Of the class; None for what is written, for a number, and where nobody could be asked.
    """

    text: str
    probability: float | None = optional()


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt and its answers.

    Args:
        prompt: The text; the two of a pair on two lines.
        answers: In the order of the columns; None where nobody could be asked.
        task: Whose head answers, or whose prompt it is; None where everybody writes.
        columns: Who answers, where that is not everybody.
    """

    prompt: str
    answers: tuple[Answer | None, ...] = nested(Answer)
    task: str | None = optional()
    columns: tuple[str, ...] | None = optional()


@dataclass(frozen=True, slots=True)
class Tried:
    """All answers side by side.

    Args:
        merge: What was tried.
        base: The base.
        columns: Who answers: the base, each adapter, the merge; of classifiers the base, the task's adapter, the merge.
        rows: Prompts in their order, those for everybody (of classifiers with the answers of one task after another), then those of
            single tasks.
        missing: Adapters of the merge that were not found, and heads that cannot be looked at, and why.
        notes: What a reader has to know, such as whether the chat template was used.
    """

    merge: str
    base: str
    columns: tuple[str, ...]
    rows: tuple[Asked, ...] = nested(Asked)
    missing: tuple[Missing, ...] = nested(Missing, ())
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrySettings:
    """How prompts are asked.

    Args:
        tokens: New tokens at most.
        chat: Whether the tokenizer's chat template is put around each prompt; None where
            `plait.fidelity.chat.template_used` decides.
        max_length: Tokens of a prompt that are read.
        batch_size: Texts a pass.
    """

    tokens: int = 64
    chat: bool | None = None
    max_length: int = 512
    batch_size: int = 16
