"""What a process keeps loaded while it works: tasks, rows, the base model."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from plait.border.checked import Json
from plait.border.counts import agreed, plural
from plait.disk.hub import split_revision
from plait.disk.store import sha256_file
from plait.errors import UsageError
from plait.evaluation.evaluate import Evaluator
from plait.model.base import BaseModel
from plait.model.identity import held_fingerprint
from plait.progress import note
from plait.recipes.recipe import Settings
from plait.recipes.sections import TaskSpec
from plait.tasks import Examples, Source, Task, glue_task, load_examples, load_task
from plait.tasks.rows import skipped_rows
from plait.tasks.tables import hub_table, rows_sha256
from plait.tasks.task import TEXT_KINDS

DEFAULT_METRICS = {
    "classification": ("accuracy",),
    "regression": ("pearson", "spearman"),
    "causal": ("exact_match",),
    "seq2seq": ("exact_match",),
}


def task_of(spec: str | TaskSpec, root: Path | None) -> Task:
    """A recipe's task entry as a `Task`: a GLUE name, or a described one."""
    if isinstance(spec, str):
        return glue_task(spec, root)
    return Task(
        name=spec.name,
        kind=spec.kind,
        source=Source(spec.train, spec.validation),
        text_columns=tuple(spec.text),
        label_column=spec.label,
        labels=tuple(spec.labels) if spec.labels else None,
        metrics=tuple(spec.metrics or DEFAULT_METRICS[spec.kind]),
        template=spec.template,
        chat=spec.chat,
        stop=spec.stop,
        extract=spec.extract,
        compare=spec.compare,
        empty=spec.empty,
        references=spec.references,
    )


@dataclass
class Session:
    """Everything that the stages of one base share; loaded when first asked for.

    Args:
        recipe: A checked recipe, or the settings of a single stage.
        shared: A session of the same base whose tasks include this one's: its loaded model and rows are used.
    """

    recipe: Settings
    shared: Session | None = None
    _cache: dict[Any, Any] = field(default_factory=dict)

    @functools.cached_property
    def base(self) -> BaseModel:
        """The base model of the recipe."""
        spec = self.recipe.base
        name, revision = split_revision(spec.model)
        if revision and spec.revision not in (None, revision):
            raise UsageError(f"two revisions, {revision!r} and {spec.revision!r}", where="base.revision")
        return BaseModel(name, revision or spec.revision, spec.dtype, spec.device, spec.four_bits)

    @functools.cached_property
    def base_sha256(self) -> str:
        """Fingerprint of the base: of everything that is loaded from it, and how it is held."""
        return held_fingerprint(self.base)

    @functools.cached_property
    def root(self) -> Path | None:
        """Folder of local data, absolute."""
        return Path(self.recipe.data.root).expanduser().absolute() if self.recipe.data.root else None

    @functools.cached_property
    def tasks(self) -> dict[str, Task]:
        """Tasks by name, class names known."""
        found = [task_of(t, self.root) for t in self.recipe.tasks]
        for task in found:
            for split, count in skipped_rows(task, root=self.root).items():
                left = f"with an empty cell {agreed(count, 'is', 'are')} left out"
                note(f"task {task.name}: {plural(count, f'{split} row')} {left} (empty: skip)")
        return {t.name: load_task(t, root=self.root) for t in found}

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """The base loaded for prediction, with every task's validation rows."""
        if self.shared is not None:
            return self.shared.evaluator
        examples = {name: self.validation(name) for name in self.tasks}
        spec = self.recipe.evaluation
        return Evaluator(self.base, self.tasks, examples, spec.batch_size, self.recipe.data.max_length)

    def load(self) -> None:
        """Load the base now rather than when it is first asked for."""
        self.evaluator.task_model(next(iter(self.tasks)))

    def validation(self, task: str) -> Examples:
        """A task's validation rows: the same for every arm and seed."""
        return self._examples(task, "validation", self.recipe.data.validation_rows, 0)

    def training(self, task: str, seed: int) -> Examples:
        """A task's training rows; the seed draws which, where the recipe limits their number."""
        if self.recipe.data.selection_rows is None:
            return self._examples(task, "train", self.recipe.data.train_rows, seed)
        return self._parted(task, seed)[0]

    def selection(self, task: str, seed: int) -> Examples | None:
        """Training rows kept back, to choose the best moment of a training by; None where the recipe keeps none."""
        return None if self.recipe.data.selection_rows is None else self._parted(task, seed)[1]

    def _parted(self, task: str, seed: int) -> tuple[Examples, Examples]:
        """Training and selection rows, drawn by the seed, none in both."""
        whole, data = self._examples(task, "train", None, 0), self.recipe.data
        kept = data.selection_rows or 0
        if kept >= len(whole):
            raise UsageError(
                f"selection_rows {kept} leaves nothing of {plural(len(whole), 'training row')}", where=f"task {task}"
            )
        order = np.random.default_rng([seed, 0x53454C]).permutation(len(whole))  # "SEL": apart from other draws
        trained = order[kept:] if data.train_rows is None else order[kept:][: data.train_rows]
        return whole.take(np.sort(trained)), whole.take(np.sort(order[:kept]))

    def sample(self, task: str, seed: int) -> Examples:
        """The training rows whose statistics are taken."""
        return self._examples(task, "train", self.recipe.statistics.samples, seed)

    def _examples(self, task: str, split: str, rows: int | None, seed: int) -> Examples:
        if self.shared is not None:
            return self.shared._examples(task, split, rows, seed)
        key = (task, split, rows, seed)
        if key not in self._cache:
            self._cache[key] = load_examples(self.tasks[task], split, root=self.root, rows=rows, seed=seed)
        return self._cache[key]  # type: ignore[no-any-return]

    def data_identity(self, task: str) -> Json:
        """What a task's rows are: its description, and the hashes of local files and of what names on the hub stand for."""
        found = asdict(self.tasks[task])
        for later in (
            "chat",
            "stop",
            "extract",
            "compare",
            "empty",
            "references",
        ):  # without them an identity stays what it was before they came
            if found[later] is None:
                del found[later]
        for split in ("train", "validation"):
            place = found["source"][split]
            if place and place.startswith("hub:"):
                found["source"][split] = self._hub_hash(place, task)
            elif place:
                found["source"][split] = self._file_hash(Path(self.root or ".") / place)
        return found

    def _hub_hash(self, place: str, task: str) -> str:
        key = ("sha256", place)
        if key not in self._cache:
            self._cache[key] = f"{place}:{rows_sha256(hub_table(place, f'task {task}'))}"
        return self._cache[key]  # type: ignore[no-any-return]

    def _file_hash(self, path: Path) -> str:
        key = ("sha256", path)
        if key not in self._cache:
            self._cache[key] = f"{path.name}:{sha256_file(path)}" if path.is_file() else f"{path.name}:missing"
        return self._cache[key]  # type: ignore[no-any-return]


def require_one_form(session: Session) -> None:
    """Refuse, before anything is computed, kinds of tasks that no one model can do together.

    Raises:
        UsageError: Names the task.
    """
    tasks = list(session.tasks.values())
    forms = {t.name: t.kind if t.kind in TEXT_KINDS else "with a head" for t in tasks}
    for task in tasks:
        if forms[task.name] != forms[tasks[0].name]:
            raise UsageError(
                f"a run has tasks of one form, this is {forms[task.name]} and {tasks[0].name} is {forms[tasks[0].name]}",
                where=f"task {task.name}",
            )
