"""Fixtures for every room: tiny bases of six architectures, tiny tasks on disk, tiny recipes."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import settings
from pyarrow import csv, parquet

from plait.advice import advise
from plait.choosing import auto
from plait.disk.manifest import MANIFEST, sealed
from plait.entry import SAME_PRODUCTS
from plait.fidelity.panel import Panel, parts_of
from plait.model.base import BaseModel
from plait.recipes.recipe import Recipe
from plait.recipes.recipe_file import parse_recipe
from tests.panels import random_adapter, texts_of
from tests.tiny import TARGETS, WORDS, save_model

os.environ.setdefault(*SAME_PRODUCTS)  # as the command does: what is begun by it goes on here with the same bits
settings.register_profile("plait", deadline=None)  # a busy machine is no failure
settings.load_profile("plait")

Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BaseModel]:
    """tiny_base("bert") -> BaseModel of a saved tiny model, on the CPU."""
    root = tmp_path_factory.mktemp("bases")

    def get(architecture: str, **options: Any) -> BaseModel:
        folder = root / architecture
        if not folder.exists():
            save_model(folder, architecture)
        return BaseModel(str(folder), device="cpu", **options)

    return get


@pytest.fixture
def public_path() -> Iterator[Path]:
    """An empty folder that every user may enter; a test's own folder is closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.contextmanager
def unprivileged(path: Path, mode: int) -> Iterator[None]:
    """Within, a path has this mode and the process is not root, who may do anything."""
    before, was = os.geteuid(), path.stat().st_mode
    path.chmod(mode)
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)
        path.chmod(was & 0o7777)


def resealed(folder: Path, **changes: Any) -> None:
    """Give a folder's manifest other values, as if it had been written with them."""
    found = {**json.loads((folder / MANIFEST).read_text()), **changes}
    files = {n: ((folder / n).stat().st_size, digest) for n, digest in found["files"].items()}
    (folder / MANIFEST).write_text(json.dumps(sealed(found, files)))


def tiny_rows(classes: int | None, rows: int, *, seed: int = 0, pair: bool = False) -> Rows:
    """Rows whose label is decided by the words that occur; `classes` None gives a target in [0, 1]."""
    rng = np.random.default_rng(seed)
    found: Rows = []
    for _ in range(rows):
        target = int(rng.integers(classes or 5))
        filler = [WORDS[w] for w in rng.integers(10, len(WORDS), rng.integers(2, 9))]
        row: dict[str, Any] = {"text": " ".join([WORDS[target], *filler, WORDS[target]])}
        if pair:
            row["other"] = " ".join(WORDS[w] for w in rng.integers(10, len(WORDS), rng.integers(2, 9)))
        row["label"] = target / 4 if classes is None else target
        found.append(row)
    return found


def write_rows(path: Path, rows: Rows) -> Path:
    """Rows as csv, jsonl or parquet, by the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        csv.write_csv(pa.Table.from_pylist(rows), path)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_tasks(root: Path) -> list[dict[str, Any]]:
    """Three tasks as three kinds of file: binary csv, three-class pairs in jsonl, regression in parquet."""
    made = []
    for i, (name, suffix, classes) in enumerate(
        (("topic", "csv", 2), ("pairs", "jsonl", 3), ("grade", "parquet", None))
    ):
        for split, rows in (("train", 32), ("validation", 24)):
            seed = 10 * i + (split == "train")
            write_rows(root / f"{name}.{split}.{suffix}", tiny_rows(classes, rows, seed=seed, pair=classes == 3))
        made.append(
            {
                "name": name,
                "train": f"{name}.train.{suffix}",
                "validation": f"{name}.validation.{suffix}",
                "text": ["text", "other"] if classes == 3 else ["text"],
                "kind": "regression" if classes is None else "classification",
            }
        )
    return made


def tiny_raw(base: BaseModel, architecture: str, root: Path, tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """A small recipe as the YAML would have it: three arms, two merges, a handful of steps; writes its tasks' files."""
    described = write_tasks(root)
    return {
        "name": "tiny",
        "base": {"model": base.name, "device": "cpu"},
        "data": {"root": str(root), "max_length": 24},
        "tasks": [t for t in described if tasks is None or t["name"] in tasks],
        "lora": {"rank": 2, "alpha": 4, "target_modules": list(TARGETS[architecture])},
        "statistics": {"samples": 16},
        "arms": ["kaiming", "osrm", "contrastive"],
        "training": {"steps": 4, "batch_size": 8, "lr": 0.02, "checkpoint_every": 2},
        "merges": ["task_arithmetic", "ties"],
        "evaluation": {"scales": [0.5, 1.0], "batch_size": 16, "resamples": 50},
    }


@pytest.fixture
def tiny_recipe(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> Callable[..., Recipe]:
    """tiny_recipe("bert", tasks=[...], seeds=[0, 1]) -> a checked recipe whose data lie in this test's folder."""

    def make(architecture: str = "bert", *, tasks: Sequence[str] | None = None, **changed: Any) -> Recipe:
        raw = tiny_raw(tiny_base(architecture), architecture, tmp_path / "data", tasks)
        raw["data"]["selection_rows"] = changed.pop("data_selection", None)
        return parse_recipe({**raw, **changed}, "tiny")

    return make


@pytest.fixture
def recipe_file(tiny_base, tmp_path) -> Path:
    raw = tiny_raw(tiny_base("bert"), "bert", tmp_path / "data", ["topic", "grade"])
    raw |= {"arms": ["osrm"], "merges": ["task_arithmetic"]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture
def make_panel(tiny_base):
    """make_panel("bert") -> a panel of two adapters (one of three classes, one a regression; of a text model two)."""

    def make(architecture: str = "bert", kind: str = "classification", texts: int = 16, **options) -> Panel:
        base = tiny_base(architecture)
        second = "regression" if kind == "classification" else kind
        adapters = [
            random_adapter(base, architecture, "one", kind, 1),
            random_adapter(base, architecture, "two", second, 2),
        ]
        given = {a.name: texts_of(texts, i) for i, a in enumerate(adapters)}
        return Panel(base, parts_of(adapters), given, max_length=24, **options)

    return make


@pytest.fixture
def untimed(monkeypatch) -> None:
    """Choices and advice do not time themselves beforehand, which takes longer than tiny ones do."""
    monkeypatch.setattr(auto, "told", lambda *_: "about a moment")
    monkeypatch.setattr(advise, "told", lambda *_: "about a moment")
