"""A first recipe: from a base and a few files of rows to commented YAML that validates and runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plait.border.yaml_text import load_yaml
from plait.disk.hub import split_revision
from plait.disk.store import staged_file
from plait.errors import PlaitError, UsageError
from plait.model.base import BaseModel, load_config, load_tokenizer
from plait.recipes.recipe_file import parse_recipe
from plait.recipes.sections import TaskSpec
from plait.runs.session import task_of
from plait.runs.targets import default_targets
from plait.tasks import GLUE_TASKS, Task, load_examples, load_task
from plait.tasks.encoding import encode
from plait.tasks.task import TEXT_KINDS

_SAMPLE = 500  # rows of a task whose tokens are counted
_LONGEST = 512  # tokens that are proposed at most
_STEPS, _BATCH = 200, 16  # a task of few rows gets as many epochs as make so many steps
_FEWEST_EPOCHS, _MOST_EPOCHS = 3, 30
_POSITIONS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task as it is typed.

    Args:
        name: Its name.
        train: File or hub name of its rows; "" for one of GLUE's.
        text: Text columns.
        label: Label column.
        validation: File of held-out rows.
    """

    name: str
    train: str = ""
    text: tuple[str, ...] = ()
    label: str = "label"
    validation: str | None = None


@dataclass(frozen=True, slots=True)
class NewRecipe:
    """A recipe that was written.

    Args:
        output: Its file, absolute.
        tasks: Task -> its kind.
        rows: Task -> training rows.
        target_modules: What is adapted, as PEFT names it for the base.
        max_length: Tokens a row may have.
    """

    output: str
    tasks: Mapping[str, str]
    rows: Mapping[str, int]
    target_modules: tuple[str, ...]
    max_length: int


def parse_task(text: str) -> NewTask:
    """Read ``NAME=FILE:TEXT[,TEXT][:LABEL]``, or the name of a GLUE task.

    >>> parse_task("pairs=pairs.jsonl:premise,hypothesis:gold")
    NewTask(name='pairs', train='pairs.jsonl', text=('premise', 'hypothesis'), label='gold', validation=None)

    Raises:
        UsageError: Neither.
    """
    name, equals, described = text.partition("=")
    if not equals and text in GLUE_TASKS:
        return NewTask(text)
    hub = "hub:" if described.startswith("hub:") else ""
    parts = described.removeprefix("hub:").split(":")
    if not equals or not name or len(parts) < (3 if hub else 2) or not all(parts):
        hint = (
            "such as reviews=reviews.csv:review:sentiment, pairs=pairs.jsonl:premise,hypothesis:label, or a GLUE task"
        )
        raise UsageError(f"--task {text!r} is not NAME=FILE:TEXT[,TEXT][:LABEL]", hint=hint)
    if len(parts) == 2:
        parts = [*parts, "label"]
    return NewTask(name, hub + ":".join(parts[:-2]), tuple(parts[-2].split(",")), parts[-1])


def new_recipe(
    path: Path, base: str, tasks: Sequence[NewTask], *, kind: str | None = None, overwrite: bool = False
) -> NewRecipe:
    """Write a recipe for a base and tasks, after looking at both.

    The kind of the tasks follows from the base (a decoder writes its answers) and from the labels, the modules are PEFT's
    own for the base, and rows may be as long as 99 in 100 of them are.

    Args:
        path: The YAML file.
        base: Folder or hub name.
        tasks: At least two.
        kind: Kind of all described tasks; None to find out.
        overwrite: Replace what stands there.

    Raises:
        UsageError: One task only, or GLUE's beside a kind without heads.
        InputError: A base or a file that cannot be read, or a column that is not there.
    """
    if len(tasks) < 2:
        raise UsageError("a recipe merges the adapters of two tasks or more", hint="--task again")
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError("a recipe is a .yaml file", where=str(path))
    if path.exists() and not overwrite:
        raise UsageError("exists", where=str(path), hint="another name, or --overwrite")
    folder = Path(base).expanduser()
    base = str(folder.absolute()) if folder.is_dir() else base
    model = BaseModel(*split_revision(base))
    config = load_config(model)
    found = [_looked_at(t, kind or _kind_of(config)) for t in tasks]
    if {f.kind in TEXT_KINDS for f in found} == {True, False}:
        raise UsageError("GLUE's tasks want a head, and the others are answered in words", hint="--kind classification")
    rows = {t.name: len(load_examples(t, "train")) for t in found if _is_local(t)}
    targets = tuple(default_targets(base))
    length = _length(model, config, [t for t in found if _is_local(t)])
    text = _yaml(path.stem, base, [(n, t) for n, t in zip(tasks, found, strict=True)], targets, length, rows)
    parse_recipe(load_yaml(text, str(path)), str(path))
    with staged_file(path, overwrite=overwrite, ours=_is_recipe) as stage:
        stage.write_text(text, encoding="utf-8")
    return NewRecipe(str(path.absolute()), {t.name: t.kind for t in found}, rows, targets, length)


def _is_recipe(path: Path) -> bool:
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except (PlaitError, OSError, UnicodeDecodeError):
        return False
    return isinstance(raw, dict) and "tasks" in raw and "arms" in raw


def _is_local(task: Task) -> bool:
    return not task.source.train.startswith("hub:")


def _kind_of(config: Any) -> str | None:
    """What a base is for: causal for a decoder, seq2seq for one that has both halves; None where a head is wanted."""
    architecture = next(iter(config.architectures or [""]))
    if architecture.endswith(("ForCausalLM", "LMHeadModel")) and not getattr(config, "is_encoder_decoder", False):
        return "causal"
    return "seq2seq" if architecture.endswith("ForConditionalGeneration") else None


def _looked_at(task: NewTask, kind: str | None) -> Task:
    """The task with what its rows tell; its kind by its labels where none is given: fractions are targets."""
    if not task.train:
        return task_of(task.name, None)
    if kind is not None:
        return load_task(task_of(_spec(task, kind), None))
    described = _spec(task, "classification")
    if task.train.startswith("hub:"):
        return task_of(described, None)
    numbers = task_of(_spec(task, "regression"), None)
    try:
        values = np.asarray(load_examples(numbers, "train").labels, np.float64)
    except PlaitError:  # names of classes, or what `load_task` says of them
        return load_task(task_of(described, None))
    return load_task(numbers if (values != np.round(values)).any() else task_of(described, None))


def _spec(task: NewTask, kind: str) -> TaskSpec:
    template = _template(task) if kind in TEXT_KINDS else None
    paths = (_absolute(task.train), _absolute(task.validation) if task.validation else None)
    return TaskSpec(
        name=task.name, train=paths[0], validation=paths[1], text=list(task.text), label=task.label, kind=kind,  # type: ignore[arg-type]
        template=template,
    )  # fmt: skip


def _template(task: NewTask) -> str:
    return "\n".join("{" + column + "}" for column in task.text) + f"\n{task.label}:"


def _absolute(place: str) -> str:
    return place if place.startswith("hub:") else str(Path(place).expanduser().absolute())


def _length(base: BaseModel, config: Any, tasks: Sequence[Task]) -> int:
    """How many tokens 99 in 100 rows have, in steps of 8, as far as the base has positions."""
    tokenizer, lengths = load_tokenizer(base), [16]
    for task in tasks:
        rows = encode(tokenizer, task, load_examples(task, "train", rows=_SAMPLE), 1 << 20)
        lengths.append(int(np.quantile([len(r["input_ids"]) for r in rows], 0.99)))
    positions: list[int] = [p for name in _POSITIONS if (p := getattr(config, name, None))]
    if tasks:
        return min(8 * math.ceil(max(lengths) / 8), _LONGEST, *(p - 2 for p in positions))  # two are RoBERTa's pads
    return min(128, *(p - 2 for p in positions)) if positions else 128


def _yaml(
    name: str,
    base: str,
    tasks: Sequence[tuple[NewTask, Task]],
    targets: Sequence[str],
    length: int,
    rows: Mapping[str, int],
) -> str:
    """The recipe's text; every choice has its comment."""
    places = [p for _, t in tasks for p in (t.source.train, t.source.validation) if p and not p.startswith("hub:")]
    glue = any(not n.train for n, _ in tasks)
    root = os.path.commonpath([str(Path(p).parent) for p in places]) if places and not glue else None
    listed = "\n".join(_task_line(n, t, root) for n, t in tasks)
    few = min(rows.values(), default=10**6)
    epochs = min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, math.ceil(_STEPS * _BATCH / few)))
    return f"""\
# Written by `plait new`. Next: plait validate FILE, plait plan FILE (what it takes), plait run FILE --out DIR.
# Any value can be changed for one run: --set training.epochs=1. All keys: plait schema, docs/tasks.md.
name: {_plain(name)}
base:
  model: {_plain(base)}
  dtype: float32                # bfloat16 halves the memory, and is fast on a GPU
data:
  root: {_plain(root) if root else "null"}        # folder of the files below
  max_length: {length}                 # tokens a row; longer ones are cut
  # train_rows: 1000            # fewer rows, drawn by the seed
tasks:                          # without `validation` every fifth row is kept for scores
{listed}
lora: {{rank: 8, alpha: 16, target_modules: [{", ".join(map(_plain, targets))}]}}   # PEFT's own modules for this base
statistics: {{samples: 100}}      # rows of each task that are looked at before training
arms:                           # ways to start and train; each trains an adapter a task
  - kaiming                     # as PEFT does
  - {{name: contrastive_penalised, subspace: contrastive, training: {{constraint: penalised}}}}   # made to be merged
training:
  epochs: {epochs}
  batch_size: {_BATCH}
  lr: 1.0e-3                    # a list, [5.0e-4, 1.0e-3, 2.0e-3], makes an arm of each
  warmup_ratio: 0.06
merges: [task_arithmetic, tsv, regmean]   # `plait ls merges` lists all
evaluation: {{scales: [0.3, 0.5, 0.7, 1.0, 1.5]}}   # the best is chosen on one half of the rows, reported on the other
seeds: [0]                      # [0, 1, 2] tells chance from difference
"""


def _task_line(typed: NewTask, task: Task, root: str | None) -> str:
    if not typed.train:
        return f"  - {typed.name}"
    places = {"train": task.source.train, "validation": task.source.validation}
    shown = {
        k: os.path.relpath(p, root) if root and not p.startswith("hub:") else p
        for k, p in places.items()
        if p is not None
    }
    text = ", ".join(map(_plain, task.text_columns))
    parts = [f"name: {_plain(task.name)}", *(f"{k}: {_plain(v)}" for k, v in shown.items())]
    parts += [f"text: [{text}]", f"label: {_plain(task.label_column)}"]
    parts += [f"kind: {task.kind}"] if task.kind != "classification" else []
    parts += [f"template: {json.dumps(task.template, ensure_ascii=False)}"] if task.template else []
    return f"  - {{{', '.join(parts)}}}"


def _plain(text: str) -> str:
    """A text as YAML has it inside a list or mapping: bare where it comes back the same."""
    safe = all(c.isalnum() or c in "_./-" for c in text)
    return text if safe and load_yaml(f"[{text}]", "a name") == [text] else json.dumps(text, ensure_ascii=False)
