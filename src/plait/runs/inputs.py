"""What a study was made from, kept in its folder: with it tables are written where neither the base nor the data are."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.border.records import from_json, to_json
from plait.disk.store import SCHEMA, read_json, sha256_json, staged_file
from plait.errors import InputError
from plait.evaluation.evaluate import scored_labels
from plait.recipes.recipe import Recipe
from plait.runs.lengths import Cuts, without_whole
from plait.runs.session import Session
from plait.tasks import Source, Task
from plait.tasks.lengths import Cut

INPUTS_FILE = "inputs.json"
_DIGEST = "inputs_sha256"  # of the file's other content; earlier files have none
Labels = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The base and the data of a study, by what names its results and by what its answers are scored against.

    Args:
        base_sha256: Fingerprint of the base.
        data: Task -> what its rows are, as `Session.data_identity` has it.
        background: The same of the tasks that only lend their statistics.
        labels: Task -> (n,) class ids or values of all its validation rows, in order. No texts.
        cut: Task -> split -> how many rows are longer than `data.max_length`, where any are.
    """

    base_sha256: str
    data: dict[str, dict[str, Any]]
    background: dict[str, dict[str, Any]]
    labels: dict[str, Labels]
    cut: Cuts = field(default_factory=dict)

    def only(self, recipe: Recipe) -> Inputs:
        """What a study within this one reads: its own tasks, in its order."""
        names = [t if isinstance(t, str) else t.name for t in recipe.tasks]
        return replace(
            self,
            data={t: self.data[t] for t in names},
            labels={t: self.labels[t] for t in names},
            cut={t: self.cut[t] for t in names if t in self.cut},
        )

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks; their files are named by their hashes, and nobody reads them."""
        return {name: _task(found) for name, found in self.data.items()}


def _task(found: dict[str, Any]) -> Task:
    lists = {k: tuple(found[k]) for k in ("text_columns", "labels", "metrics") if found[k] is not None}
    return Task(**{**found, **lists, "source": Source(**found["source"])})


def inputs_of(session: Session, background: Session, cut: Cuts) -> Inputs:
    """What a session's base and rows are.

    Args:
        session: Base, data and tasks.
        background: The same of the tasks that only lend their statistics.
        cut: See `plait.runs.lengths.cuts_of`.

    Cost: hashes the base and the files of the data, and reads the validation rows.
    """
    labels = {t: scored_labels(task, session.validation(t)) for t, task in session.tasks.items()}
    return Inputs(
        session.base_sha256,
        {t: session.data_identity(t) for t in session.tasks},
        {t: background.data_identity(t) for t in background.tasks},
        labels,
        without_whole(cut),
    )


def keep_inputs(found: Inputs, out: Path) -> None:
    """Write them into a study's folder; the same again changes nothing."""
    content = {
        "schema": SCHEMA,
        "base_sha256": found.base_sha256,
        "data": found.data,
        "background": found.background,
        "labels": {t: rows.tolist() for t, rows in found.labels.items()},
    }
    if found.cut:
        content["cut"] = {t: {split: to_json(cut) for split, cut in both.items()} for t, both in found.cut.items()}
    text = json.dumps({**content, _DIGEST: sha256_json(content)})
    target = out / INPUTS_FILE
    if not target.is_file() or target.read_text(encoding="utf-8") != text + "\n":
        with staged_file(target, overwrite=True) as stage:
            stage.write_text(text + "\n", encoding="utf-8")


def kept_inputs(out: Path, kept: Recipe, wanted: Recipe) -> Inputs | None:
    """What a study's folder says it was made from.

    Args:
        out: The folder.
        kept: The study as it lies there.
        wanted: The study as it is asked about.

    Returns:
        None where the folder does not say, or where the base or the data that are asked about are others.

    Raises:
        InputError: A damaged file.
    """
    path = out / INPUTS_FILE
    if not path.is_file() or not within(wanted, kept):
        return None
    found = read_json(path)
    try:
        if found["schema"] != SCHEMA:
            raise ValueError(found["schema"])
        if _DIGEST in found and found.pop(_DIGEST) != sha256_json(found):
            raise ValueError("its digest is another")
        tasks = {t: _task(one) for t, one in found["data"].items()}
        kinds = {t: np.float32 if task.kind == "regression" else np.int64 for t, task in tasks.items()}
        labels = {t: np.asarray(found["labels"][t], kinds[t]) for t in tasks}
        cut = {
            t: {split: from_json(Cut, one, str(path)) for split, one in both.items()}
            for t, both in found.get("cut", {}).items()
        }
        return Inputs(str(found["base_sha256"]), found["data"], dict(found["background"]), labels, cut).only(wanted)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(
            f"not what a study keeps of its inputs: {e!r}", where=str(path), hint="without it, base and data are read"
        ) from None


def within(one: Recipe, other: Recipe) -> bool:
    """Whether a study reads the base and the rows of another, all or some of its tasks, as far as their files say."""
    return _read_by(one) == _read_by(other) and all(t in other.tasks for t in one.tasks)


def is_read_alike(one: Recipe, other: Recipe) -> bool:
    """Whether a study holds the base of another and reads its rows at the same length: then one loaded base serves both."""
    return within(one, other) and (one.base, one.data.max_length) == (other.base, other.data.max_length)


def _read_by(recipe: Recipe) -> tuple[Any, ...]:
    base, data = recipe.base, recipe.data
    return base.model, base.revision, base.four_bits, data.root, data.validation_rows, recipe.background
