"""Reading rows: csv, tsv, jsonl and parquet files and hub data sets, into checked `Examples`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.disk.files import nearby
from plait.errors import InputError, UsageError
from plait.tasks.answers import are_numbers, checked_references, named_answer, numbered, require_slots
from plait.tasks.chat import checked_messages, packed
from plait.tasks.tables import as_written, hub_table, read_table
from plait.tasks.task import OPEN_ONLY, SPLITS, TEXT_KINDS, Examples, Task
from plait.tasks.text_alone import no_labels, without_labels
from plait.tasks.written import require_some_right

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ANSWERS = 200  # text tasks with at most so many distinct answers choose among them; with more the answers are open
_CLASS_LIMIT = 100_000  # larger numbers are identifiers of something else
_LARGEST = float(np.finfo(np.float32).max)
HELD_OUT_EVERY = 5  # without a validation file, every fifth row is held out


def load_task(task: Task, *, root: Path | None = None) -> Task:
    """Complete a task by what its training rows tell: class names or answers (where none are given), the mean of targets."""
    if not task.label_column:
        return without_labels(task)
    if task.kind == "regression":
        targets = np.asarray(load_examples(task, "train", root=root).labels)
        return replace(task, target_mean=float(targets.mean()))
    if task.kind in TEXT_KINDS and not task.labels:
        if task.is_written or set(task.metrics) & set(OPEN_ONLY):
            return task
        distinct = sorted(set(load_examples(task, "train", root=root).labels))
        return replace(task, labels=tuple(map(str, distinct))) if len(distinct) <= MAX_ANSWERS else task
    if task.kind != "classification" or task.labels:
        return task
    column = _label_cells(task, "train", root)
    if not column:
        raise InputError("no rows", where=_where(task, "train"))
    distinct = sorted(set(column))
    if len(distinct) < 2:
        raise InputError(
            f"only one class: {distinct[:1]}",
            where=_where(task, "train"),
            hint="rows of two classes, or give the task its labels",
        )
    if _are_ids(distinct):
        if distinct[0] < 0 or distinct[-1] >= _CLASS_LIMIT:
            odd = distinct[0] if distinct[0] < 0 else distinct[-1]
            raise InputError(
                f"label {odd} is no class id: they count from 0", where=_where(task, "train"), hint="or use names"
            )
        return replace(task, labels=tuple(str(i) for i in range(distinct[-1] + 1)))
    if task.source.validation and _are_ids(_label_cells(task, "validation", root)):
        raise InputError(
            f"column {task.label_column!r} holds numbers, that of the training rows names",
            where=_where(task, "validation"),
            hint="give the task its labels, in order",
        )
    return replace(task, labels=tuple(str(v) for v in distinct))


def _label_cells(task: Task, split: str, root: Path | None) -> list[Any]:
    column: list[Any] = _table(task, split, root)[task.label_column].to_pylist()
    if task.empty == "skip":
        return [v for v in column if not _is_empty(v)]
    _require_filled(column, range(len(column)), task, split)
    return column


def _require_filled(column: Sequence[Any], ids: Any, task: Task, split: str) -> None:
    empty = next((i for i, v in zip(ids, column, strict=True) if v is None or v == ""), None)
    if empty is not None:
        raise _empty_cell(task, task.label_column, "an empty cell", empty, split)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _empty_cell(task: Task, column: str, what: str, row: Any, split: str) -> InputError:
    return InputError(
        f"column {column!r} has {what} in row {row}",
        where=_where(task, split),
        hint=f"empty: skip in the recipe's task, or --set tasks.{task.name}.empty=skip, leaves such rows out",
    )


def skipped_rows(task: Task, *, root: Path | None = None) -> dict[str, int]:
    """Count the rows that `empty: skip` leaves out, by the file's split; splits without any are left out.

    Args:
        task: Any; one that refuses empty cells skips none.
        root: Folder that relative files of the task's source are found in.
    """
    if task.empty != "skip":
        return {}
    splits = SPLITS if task.source.validation else SPLITS[:1]
    tables = {split: _table(task, split, root) for split in splits}
    counts = {split: table.num_rows - len(_filled(table)) for split, table in tables.items()}
    return {split: count for split, count in counts.items() if count}


def _filled(table: pa.Table) -> Any:
    """(n,) numbers of the rows without an empty cell."""
    empty = np.zeros(table.num_rows, bool)
    for name in table.column_names:
        empty |= np.fromiter(map(_is_empty, table[name].to_pylist()), bool, table.num_rows)
    return np.flatnonzero(~empty)


def _are_ids(column: Sequence[Any]) -> bool:
    return bool(column) and all(isinstance(v, int) and not isinstance(v, bool) for v in column)


def load_examples(
    task: Task, split: str, *, root: Path | None = None, rows: int | None = None, seed: int = 0
) -> Examples:
    """Read and check one split of a task.

    Args:
        task: With its class names known (see `load_task`).
        split: "train" or "validation".
        root: Folder that relative files of the task's source are found in.
        rows: How many, drawn without replacement by `seed` and kept in file order; None for all.
        seed: Seed of that draw.

    Raises:
        UsageError: A template without one of the text columns, or of a task without prompts.
        InputError: File or column missing, an empty cell, a label that is not one of the task's, no rows; names the
            file, the column and the row. Of answers that are written: none of the right ones would count as right.
    """
    if split not in SPLITS:
        raise UsageError(f"split {split!r}, expected {' or '.join(SPLITS)}", where=f"task {task.name}")
    _require_template(task)
    table = _table(task, split, root)
    ids = np.arange(table.num_rows, dtype=np.int64)
    if task.source.validation is None:
        held = ids % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        ids = ids[held if split == "validation" else ~held]
    if task.empty == "skip":
        ids = np.intersect1d(ids, _filled(table))
    if rows is not None and rows < len(ids):
        ids = np.sort(np.random.default_rng(seed).permutation(ids)[:rows])
    if len(ids) == 0:
        raise InputError("no rows", where=_where(task, split))
    table = table.take(ids)
    if task.chat == "messages":
        cells, where = table[task.text_columns[0]].to_pylist(), _where(task, split)
        pairs = [packed(checked_messages(c, f"{where}, row {i}")) for i, c in zip(ids, cells, strict=True)]
        texts: tuple[tuple[str, ...], ...] = tuple((before,) for before, _ in pairs)
        labels = tuple(last for _, last in pairs)
    else:
        texts, labels = _texts(task, table, ids, split), _labels(task, table, ids, split)
    require_slots(task, labels, ids, _where(task, split))
    references = None
    if task.references is not None and task.references in table.column_names:
        references = checked_references(table[task.references].to_pylist(), ids, task.references, _where(task, split))
    examples = Examples(texts, labels, ids, references)
    if split == "validation":
        require_some_right(task, examples, _where(task, split))
    return examples


def _where(task: Task, split: str) -> str:
    return f"task {task.name}, {task.source.train if split == 'train' else task.source.validation or task.source.train}"


def _texts(task: Task, table: pa.Table, ids: Any, split: str) -> tuple[tuple[str, ...], ...]:
    columns = []
    for name in task.text_columns:
        values = table[name].to_pylist()
        for i, v in zip(ids, values, strict=True):
            if not isinstance(v, str) or not v.strip():
                raise _empty_cell(task, name, "an empty cell" if not v else repr(v), i, split)
        columns.append(values)
    rows = zip(*columns, strict=True)
    if task.kind not in TEXT_KINDS:
        return tuple(tuple(r) for r in rows)
    if task.template is None:
        return tuple(("\n".join(r),) for r in rows)
    return tuple((_fill(task, dict(zip(task.text_columns, r, strict=True))),) for r in rows)


def _fill(task: Task, fields: dict[str, str]) -> str:
    """Put a row's texts into the template, all at once: what a text itself says in braces stays as it is."""
    named = re.compile("|".join(re.escape("{" + name + "}") for name in fields))
    return named.sub(lambda place: fields[place.group()[1:-1]], task.template or "")


def _require_template(task: Task) -> None:
    """Refuse a template that nothing is put into, or that leaves a column out: a misspelled field says the same of every row.

    Raises:
        UsageError: Names the column.
    """
    if task.template is None:
        return
    if task.kind not in TEXT_KINDS or task.chat == "messages":
        what = "rows of conversations" if task.chat == "messages" else f"a {task.kind} task"
        raise UsageError(f"a template is of prompts, this is {what}", where=f"task {task.name}", hint="leave it out")
    if unused := [c for c in task.text_columns if "{" + c + "}" not in task.template]:
        raise UsageError(
            f"the template has no {{{unused[0]}}}, which is among the text columns",
            where=f"task {task.name}",
            hint=f"put it in, or leave {unused[0]!r} out of `text`",
        )


def _labels(task: Task, table: pa.Table, ids: Any, split: str) -> Any:
    if not task.label_column:
        return no_labels(task, len(ids))
    values = table[task.label_column].to_pylist()
    _require_filled(values, ids, task, split)
    if task.kind == "regression":
        return _numbers(task, values, ids, split)
    if task.kind in TEXT_KINDS:
        values = numbered(values, task.labels or ())
        return tuple(named_answer(task, v, i, split, _where(task, split)) for i, v in zip(ids, values, strict=True))
    known = {name: i for i, name in enumerate(task.labels or ())}
    named = are_numbers(task.labels or ())  # then numbers mean themselves, wherever they stand in the list
    classes = [
        v if isinstance(v, int) and not isinstance(v, bool) and not named else known.get(str(v), -1) for v in values
    ]
    for i, v, raw in zip(ids, classes, values, strict=True):
        if not 0 <= v < len(known):
            raise InputError(
                f"label {raw!r} in row {i} is not one of the {len(known)} classes {list(known)[:5]}",
                where=_where(task, split),
            )
    return np.asarray(classes, np.int64)


def _numbers(task: Task, values: list[Any], ids: Any, split: str) -> Any:
    for i, v in zip(ids, values, strict=True):
        if isinstance(v, str | bool) or not abs(float(v)) <= _LARGEST:
            raise InputError(f"target {v!r} in row {i} is not a finite number", where=_where(task, split))
    return np.asarray([float(v) for v in values], np.float32)


def _table(task: Task, split: str, root: Path | None) -> pa.Table:
    place = task.source.train if split == "train" else task.source.validation or task.source.train
    wanted = [*task.text_columns, *([] if task.chat == "messages" or not task.label_column else [task.label_column])]
    plain = wanted if task.chat != "messages" else []  # conversations are checked one by one
    if task.references is not None and split == "validation":
        wanted = [*wanted, task.references]
    if twice := [c for c in wanted if wanted.count(c) > 1]:
        raise UsageError(f"column {twice[0]!r} is asked for twice, as text or as label", where=f"task {task.name}")
    table = _source_table(task, place, root)
    missing = [c for c in wanted if c not in table.column_names]
    if missing:
        raise InputError(
            f"no column {missing[0]!r}; there are {', '.join(map(repr, table.column_names[:12]))}",
            where=_where(task, split),
        )
    for name in plain:
        _require_plain(table, name, task, split)
    return table.select(wanted)


def columns_of(task: Task, *, root: Path | None = None) -> list[str]:
    """Names of the columns of a task's training rows."""
    names: list[str] = _source_table(task, task.source.train, root).column_names
    return names


def _source_table(task: Task, place: str, root: Path | None) -> pa.Table:
    if place.startswith("hub:"):
        return hub_table(place, f"task {task.name}")
    path = Path(root or ".") / place
    if not path.exists():
        raise InputError(
            "no such file", where=str(path), hint=f"{nearby(path)}; a recipe's files lie under its data.root"
        )
    table = read_table(path, task.text_columns)
    return as_written(path, table, task.label_column) if task.kind in TEXT_KINDS else table


def _require_plain(table: pa.Table, name: str, task: Task, split: str) -> None:
    import pyarrow as pa

    if table.column_names.count(name) > 1:
        raise InputError(f"column {name!r} stands twice", where=_where(task, split))
    kind = table.schema.field(name).type
    if pa.types.is_nested(kind) or pa.types.is_temporal(kind) or pa.types.is_binary(kind):
        raise InputError(f"column {name!r} holds {kind}, expected text or numbers", where=_where(task, split))
    try:
        table[name].validate(full=True)
    except pa.ArrowInvalid:
        raise InputError(f"column {name!r} is not UTF-8", where=_where(task, split), hint="save it as UTF-8") from None
