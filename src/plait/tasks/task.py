"""What a task is: where its rows lie, which columns are read, and how it is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from plait.border.counts import plural
from plait.errors import InputError, UsageError

KINDS = ("classification", "regression", "causal", "seq2seq")
TEXT_KINDS = ("causal", "seq2seq")
CHATS = (None, "prompt", "messages")
COMPARISONS = (None, "exact", "case", "squad", "number")
SLOT_METRICS = ("slot_f1", "intent_accuracy")  # of answers that are JSON
OPEN_ONLY = ("rouge_l", "likelihood", *SLOT_METRICS)  # metrics of what a model writes, not of what it chooses
SPLITS = ("train", "validation")
IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows are.

    Args:
        train: A csv, tsv, jsonl or parquet file, or "hub:NAME[@REVISION][:CONFIG[:SPLIT]]"; relative to the run's data root.
        validation: A file or hub name likewise; None holds out every fifth row of `train`.
    """

    train: str
    validation: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    >>> task = Task("sst2", "classification", Source("train.tsv"), ("sentence",), labels=("negative", "positive"))
    >>> task.num_labels
    2

    Args:
        name: Names its folder, its head and its rows in every table.
        kind: "classification", "regression", "causal" (a decoder writes the label) or "seq2seq".
        source: Where its rows are.
        text_columns: One column, or two for a pair of texts.
        label_column: Class ids or names, numbers for regression, text for causal and seq2seq; "" for rows of text alone, of which
            statistics can be taken.
        labels: Class names in order of their ids.
        metrics: Names in `plait.tasks.metrics`; the score is their mean.
        target_mean: Mean of the training targets (regression): where a fresh head starts, so that the first steps are not
            spent on a constant.
        chat: For causal tasks, whether the tokenizer's chat template is put around a row: "prompt" makes the prompt a
            user's turn and the label the assistant's; "messages" reads conversations from the one text column, a list of
            {role, content} that ends with the assistant. None for plain text.
        template: For causal and seq2seq, the prompt with ``{column}`` fields; by default the texts on lines.
        stop: For causal and seq2seq, the string at which a written answer ends, such as a line feed: what a model writes
            after it does not count. With `stop`, `extract` or `compare` the model writes its answer, however few there are.
        extract: A regular expression for the part of an answer that is compared (its first group, where it has one),
            searched in the written and in the right answer; an answer without it is wrong.
        compare: How exact_match compares: "exact" (the default), "case" (case and repeated blanks are overlooked), "squad"
            (punctuation and articles, too) or "number" (the first number, by value).
        references: For causal and seq2seq, a column with a list of strings: more right answers beside the label. Of
            exact_match and rouge_l the best over all of them counts. Rows that are only trained on need none.
        empty: "skip" leaves rows out that have an empty cell in a column that is read; None refuses them.
    """

    name: str
    kind: str
    source: Source
    text_columns: tuple[str, ...]
    label_column: str = "label"
    labels: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    template: str | None = None
    target_mean: float = 0.0
    chat: str | None = None
    stop: str | None = None
    extract: str | None = None
    compare: str | None = None
    empty: str | None = None
    references: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"kind {self.kind!r}, expected one of {', '.join(KINDS)}", where=f"task {self.name}")
        if not self.text_columns:
            raise UsageError("no text column", where=f"task {self.name}", hint="`text` names one column or two")
        if self.empty not in (None, "skip"):
            raise UsageError(f"empty {self.empty!r}, expected skip", where=f"task {self.name}")
        if self.chat not in CHATS or (self.chat and self.kind != "causal"):
            raise UsageError(
                f"chat {self.chat!r} of a {self.kind} task", where=f"task {self.name}",
                hint="prompt or messages, for causal tasks",
            )  # fmt: skip
        if self.chat == "messages" and len(self.text_columns) != 1:
            raise UsageError(
                f"{plural(len(self.text_columns), 'column')} of text, and conversations lie in one",
                where=f"task {self.name}",
                hint="`text: [messages]`, or chat: prompt",
            )
        if self.labels and (written := sorted(set(self.metrics) & set(OPEN_ONLY))) and self.kind in TEXT_KINDS:
            raise UsageError(
                f"metric {written[0]!r} scores what is written, and `labels` make answers to choose from",
                where=f"task {self.name}",
            )
        self._check_written()
        if len(self.text_columns) > 2 and self.kind not in TEXT_KINDS:
            raise UsageError("at most two text columns", where=f"task {self.name}")

    def _check_written(self) -> None:
        """Refuse what says how written answers are compared where none are written, or what it cannot mean."""
        if self.compare not in COMPARISONS:
            raise UsageError(
                f"compare {self.compare!r}, expected one of {', '.join(filter(None, COMPARISONS))}",
                where=f"task {self.name}",
            )
        if self.references is not None and (self.labels or self.kind not in TEXT_KINDS):
            raise UsageError("references are of answers that are written", where=f"task {self.name}")
        if self.stop == "":
            raise UsageError("an empty stop string", where=f"task {self.name}")
        if self.is_written and (self.labels or self.kind not in TEXT_KINDS):
            raise UsageError(
                "stop, extract and compare are for answers that are written"
                + (", and `labels` make answers to choose from" if self.labels else ""),
                where=f"task {self.name}",
            )

    @property
    def is_written(self) -> bool:
        """Whether something says how a written answer is compared."""
        return any(x is not None for x in (self.stop, self.extract, self.compare, self.references))

    @property
    def num_labels(self) -> int:
        """Outputs of the head: classes, or 1 for regression."""
        if self.kind == "regression":
            return 1
        if not self.labels:
            raise UsageError("class names are not known yet", where=f"task {self.name}", hint="read its rows first")
        return len(self.labels)


def require_same_classes(task: Task, recorded: object, adapter: str) -> None:
    """Refuse a head whose classes have other names, or another order, than the task's: it would be scored for the wrong ones.

    Args:
        task: Its class names known.
        recorded: What the adapter's record says its head's classes are; anything but a list of names says nothing.
        adapter: Names it in the error.

    Raises:
        InputError: Both lists are named, and they differ. Bare ids (0, 1, ...) beside names say nothing either.
    """
    if task.kind != "classification" or not isinstance(recorded, list) or not task.labels:
        return
    trained, ids = tuple(map(str, recorded)), tuple(map(str, range(len(recorded))))
    if trained != task.labels and ids not in (trained, task.labels):
        raise InputError(
            f"its head was trained on the classes {', '.join(trained[:8])}, task {task.name!r} has {', '.join(task.labels[:8])}",
            where=adapter,
            hint="the same names in the same order: give the task its `labels`",
        )


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows of one split, in order.

    Args:
        texts: One tuple of one or two strings per row (the finished prompt for causal and seq2seq; of a conversation, the
            turns before the last, see `plait.tasks.chat.packed`).
        labels: (n,) int64 class ids, (n,) float32 targets, or n strings.
        ids: (n,) row numbers in the source, so that a choice of rows can be traced.
        references: One tuple of right answers per row beside its label, where the task has a column of them.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: npt.NDArray[np.int64] | npt.NDArray[np.float32] | tuple[str, ...]
    ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    references: tuple[tuple[str, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Examples:
        """Take the rows at these positions, in this order."""
        labels = self.labels
        chosen = (
            tuple(labels[i] for i in indices) if isinstance(labels, tuple) else labels[np.asarray(indices, np.int64)]
        )
        references = None if self.references is None else tuple(self.references[i] for i in indices)
        return Examples(
            tuple(self.texts[i] for i in indices), chosen, self.ids[np.asarray(indices, np.int64)], references
        )

    @property
    def right(self) -> list[tuple[str, ...]]:
        """Every right answer of each row, the label first."""
        more = self.references or ((),) * len(self)
        return [(str(label).strip(), *others) for label, others in zip(self.labels, more, strict=True)]
