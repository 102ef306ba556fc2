"""One base, loaded once, with the adapters that are to be merged: what each of them is, and how to ask any of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from plait.adapters.beside import no_matrix
from plait.adapters.lora import EMBEDDING, EXPERT, LINEAR, Adapter
from plait.border.counts import agreed
from plait.errors import InputError, UsageError
from plait.evaluation.evaluate import Evaluator
from plait.fidelity.answers import Answers
from plait.fidelity.texts import Texts
from plait.model.applied import resolve, without_layers
from plait.model.base import BaseModel, head_modules, load_head
from plait.options import did_you_mean
from plait.tasks import Examples, Source, Task
from plait.tasks.task import TEXT_KINDS

_ONLY_LAYERS = "and predictions are compared for linear layers only"
_WITHOUT = "without texts it is merged; plait eval scores it with labels"
WRITTEN = "written"  # positions of what an adapter itself writes after its prompts
_OF_TYPE = {"CAUSAL_LM": "causal", "SEQ_2_SEQ_LM": "seq2seq"}


@dataclass(frozen=True, slots=True)
class Part:
    """One task of one adapter.

    Args:
        task: Named after its head where it has one, else after the adapter.
        adapter: The adapter it belongs to.
        head: Its head's tensors; {} for text.
    """

    task: Task
    adapter: Adapter
    head: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def is_text(self) -> bool:
        """Whether it predicts tokens."""
        return self.task.kind in TEXT_KINDS


@dataclass(frozen=True, slots=True)
class Refused:
    """A head whose predictions cannot be looked at, and why."""

    task: str
    why: str


def parts_of(adapters: Sequence[Adapter]) -> list[Part]:
    """Say what the adapters predict: a part for each head, or one for an adapter of a text model.

    Raises:
        InputError: Neither heads nor a text task type: it predicts nothing that could be compared; or it changes
            more than linear modules.
        UsageError: Two parts of one name.
    """
    answering = [part for _, part in _answering(adapters)]
    errors = [part for part in answering if isinstance(part, InputError)]
    if errors and len(errors) < len(answering):  # each by its name, and what can be done with all of them
        names = list(dict.fromkeys(str(e.where).partition(": ")[0] for e in errors))
        them = agreed(len(names), "it", "them")
        what = errors[0].what + (f"; nor can {' and '.join(names[1:])}" if names[1:] else "")
        hint = f"leave {them} out, with the texts of {them}; or merge all without --text, by their factors alone"
        raise InputError(what, where=names[0], hint=hint)
    if errors:
        raise errors[0]
    return _comparable([part for part in answering if isinstance(part, Part)])


def parts_and_refused(adapters: Sequence[Adapter]) -> tuple[list[Part], tuple[Refused, ...]]:
    """Say what the adapters predict, as `parts_of` does, and which heads cannot be looked at where there are others.

    Raises:
        InputError: No head can be looked at; else as `parts_of` has it.
        UsageError: Two parts of one name.
    """
    answering = list(_answering(adapters))
    parts = [part for _, part in answering if isinstance(part, Part)]
    errors = [(name, e) for name, e in answering if isinstance(e, InputError)]
    if errors and not parts:
        raise errors[0][1]
    return _comparable(parts), tuple(Refused(name, e.what) for name, e in errors)


def _answering(adapters: Sequence[Adapter]) -> Iterator[tuple[str, Part | InputError]]:
    """Each head's or text model's name, and its part, or why its predictions cannot be looked at."""
    for adapter in adapters:
        _require_linear(adapter)
        for task, head in adapter.heads.items():
            try:
                yield task, Part(_headed(adapter, task, head), adapter, head)
            except InputError as e:
                yield task, e
        if adapter.heads:
            continue
        if adapter.task_type in _OF_TYPE:
            text = Task(adapter.name, _OF_TYPE[adapter.task_type], Source("none"), ("text",))
            yield adapter.name, Part(text, adapter, {})
        else:
            yield (
                adapter.name,
                InputError(
                    f"its task type is {adapter.task_type or 'not given'} and it carries no head: it makes no predictions to compare",
                    where=adapter.name,
                    hint="without texts it can still be merged",
                ),
            )


def _comparable(parts: list[Part]) -> list[Part]:
    """The parts, where their names differ and all are of one form."""
    names = [p.name for p in parts]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UsageError(f"two adapters bring a task {twice[0]!r}", hint="NAME=DIR gives a folder another name")
    if len({p.is_text for p in parts}) > 1:
        raise InputError("classifiers and text models cannot be compared with each other")
    return parts


def _require_linear(adapter: Adapter) -> None:
    """Whatever an adapter changes beside linear modules would be left out of its predictions."""
    if adapter.extras:
        raise InputError(
            f"it also trained {', '.join(sorted(adapter.extras)[:3])} whole, which is no LoRA update: what it predicts "
            "cannot be repeated",
            where=adapter.name,
            hint=None if no_matrix(adapter.extras) else "plait convert --base DIR makes it low rank",
        )
    if other := next((m for m, f in adapter.modules.items() if f.kind != LINEAR), None):
        raise InputError(
            f"it changes {other} ({_called(adapter.modules[other].kind)}), {_ONLY_LAYERS}",
            where=adapter.name,
            hint=_WITHOUT,
        )


def _called(kind: str) -> str:
    """A kind of module in words."""
    return {EXPERT: "a fused expert", EMBEDDING: "an embedding"}.get(kind, "a convolution")


def _headed(adapter: Adapter, name: str, head: Mapping[str, Tensor]) -> Task:
    """The task of a head: its outputs are the rows of its narrowest matrix; with one output it is a regression."""
    adapter.require_of_texts(name)
    rows = [t.shape[0] for t in head.values() if t.ndim == 2]
    if not rows:
        raise InputError("the head has no matrix", where=f"{adapter.name}: head {name}")
    if min(rows) == 1:
        return Task(name, "regression", Source("none"), ("text",), metrics=("pearson",))
    known = adapter.classes_of(name) or []
    names = tuple(known) if len(known) == min(rows) else tuple(map(str, range(min(rows))))
    return Task(name, "classification", Source("none"), ("text",), labels=names)


@dataclass(slots=True)
class Panel:
    """A base, adapters and texts of each of their tasks.

    Args:
        base: The base model.
        parts: From `parts_of`.
        texts: Task -> its texts.
        general: Texts of no task in particular, for the KL to the base; () for none.
        batch_size: Rows a pass, where one adapter is asked alone.
        max_length: Tokens a text.
        positions: Positions of a text that text models are asked at: "all", only its "end", where an answer would begin, or, of
            prompts for causal models, those of the adapter's own answer, "written" greedily.
        chat: Whether prompts go through the tokenizer's chat template before an answer is written.
        new_tokens: Tokens of such an answer, at most.
        answers: Part and text -> what was written, shared with panels of some of the texts.
        known: What heads have put out already; panels of other texts share it.
    """

    base: BaseModel
    parts: list[Part]
    texts: Mapping[str, Texts]
    general: Texts = ()
    batch_size: int = 32
    max_length: int = 128
    positions: str = "all"
    chat: bool = False
    new_tokens: int = 64
    answers: dict[tuple[str, tuple[str, ...]], tuple[int, ...]] = field(default_factory=dict)
    known: Answers = field(default_factory=Answers)
    _own: Evaluator | None = None
    _general: Evaluator | None = None
    _placed: set[str] = field(default_factory=set)  # parts whose head is in the model of their task

    def __post_init__(self) -> None:
        names = [p.name for p in self.parts]
        for task in self.texts:
            if task not in names:
                raise UsageError(f"texts for {task!r}, and no adapter of that name", hint=did_you_mean(task, names))
        if lacking := [n for n in names if not self.texts.get(n)]:
            raise UsageError(f"no texts for {', '.join(lacking)}", hint="--text TASK=FILE for every adapter")

    @property
    def is_text(self) -> bool:
        """Whether the adapters predict tokens."""
        return self.parts[0].is_text

    @property
    def names(self) -> list[str]:
        """The tasks, in order."""
        return [p.name for p in self.parts]

    def with_texts(self, texts: Mapping[str, Texts], *, general: bool = True) -> Panel:
        """Ask about other texts, with or without the general ones; the loaded base is shared."""
        for part in self.parts:
            self.model(part)  # loaded once, here, for both
        return replace(
            self,
            texts=texts,
            general=self.general if general else (),
            _own=self.evaluator.sharing(unlabelled_rows(texts)),
            _general=None,
            _placed=set(),
        )

    @property
    def evaluator(self) -> Evaluator:
        """The base for predictions on the parts' own texts."""
        if self._own is None:
            tasks = {p.name: p.task for p in self.parts}
            self._own = Evaluator(self.base, tasks, unlabelled_rows(self.texts), self.batch_size, self.max_length)
        return self._own

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.evaluator.tokenizer

    def model(self, part: Part) -> Any:
        """Give the task's model with its head in place; all share one backbone.

        Raises:
            InputError: The adapter or its head does not fit the model.
        """
        model = self.evaluator.task_model(part.name)
        if part.name in self._placed:
            return model
        _require_fit(model, part.adapter)
        if not part.is_text:
            whole = {k.partition(".")[0] for k in part.head}
            if missing := [m for m in head_modules(model) if m not in whole]:
                raise InputError(
                    f"the adapter's folder holds no {missing[0]}, which the model's head has",
                    where=part.name,
                    hint="it was trained without saving it (modules_to_save): its predictions cannot be repeated",
                )
            load_head(model, part.head)
        self._placed.add(part.name)
        return model

    def general_evaluator(self) -> Evaluator:
        """Give the base for predictions of every head on the general texts."""
        if self._general is None:
            self._general = self.evaluator.sharing(unlabelled_rows(dict.fromkeys(self.names, self.general)))
        return self._general


def _require_fit(model: Any, adapter: Adapter) -> None:
    """Every module of the adapter is in the model, at its size, and a linear layer there."""
    if odd := without_layers(model, adapter):
        kind = type(resolve(model, odd[0], adapter.prefix)).__name__
        raise InputError(f"it changes {odd[0]} ({kind}), {_ONLY_LAYERS}", where=adapter.name, hint=_WITHOUT)
    for name, f in adapter.modules.items():
        module: Any = resolve(model, name, adapter.prefix)
        shape = tuple(module.weight.shape)
        if f.kind == LINEAR and shape not in (f.shape, f.shape[::-1]):
            raise InputError(
                f"{name} is {f.shape} in it and {shape} in the base model",
                where=adapter.name,
                hint="is this adapter of another base?",
            )


def unlabelled_rows(texts: Mapping[str, Texts]) -> dict[str, Examples]:
    """Texts of every task as the rows of tasks."""
    return {name: unlabelled(rows) for name, rows in texts.items()}


def unlabelled(texts: Texts) -> Examples:
    """Texts as the rows of a task; the labels are zeros that nobody reads."""
    return Examples(texts, np.zeros(len(texts), np.int64), np.arange(len(texts)))
