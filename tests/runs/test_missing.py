"""`plait validate` of recipes whose files are not there: valid in form, said so, and no success."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from plait.cli import main
from plait.recipes.missing import missing_files
from plait.recipes.recipe_file import parse_recipe

RAW = {
    "name": "mine",
    "base": {"model": "somebody/model"},
    "tasks": [
        {"name": "mood", "train": "reviews.csv", "text": "text", "labels": ["bad", "good"]},
        {"name": "topic", "train": "hub:somebody/rows", "validation": "held out.csv", "text": "text", "labels": ["a", "b"]},
    ],
    "lora": {"target_modules": ["q_proj"]},
    "arms": ["kaiming"],
    "training": {"steps": 4, "lr": 0.02},
    "merges": ["tsv"],
}  # fmt: skip


def said(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["validate", *map(str, arguments)])
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out, out.err


def keys(raw) -> list[str]:
    return [m.key for m in missing_files(parse_recipe(raw, "r"))]


def test_a_recipe_without_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(RAW))
    code, out, err = said(capsys, "mine.yaml")
    assert code == 3 and out.startswith("mine.yaml: a valid recipe in its form\n") and err.count("\n") == 1
    assert "tasks.mood.train: reviews.csv: no such file" in out and "tasks.topic.validation: held out.csv" in out
    assert "held out.csv and 1 more are missing" in err or "reviews.csv and 1 more are missing" in err
    code, out, _ = said(capsys, "mine.yaml", "--json")
    found = json.loads(out)
    assert code == 3 and found["valid"] is False
    assert [m["path"] for m in found["missing"]] == ["reviews.csv", "held out.csv"]
    Path("review.csv").write_text("text,label\n")
    assert "did you mean 'review.csv'" in said(capsys, "mine.yaml")[1]
    Path("held out.csv").write_text("text,label\n")
    assert "error: mine.yaml: reviews.csv is missing" in said(capsys, "mine.yaml")[2]
    Path("reviews.csv").write_text("text,label\n")
    assert said(capsys, "mine.yaml") == (0, "mine.yaml: a valid recipe\n", "")


def test_where_files_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = {**RAW, "tasks": RAW["tasks"][:1], "data": {"root": str(tmp_path / "rows")}}
    assert keys(here) == ["data.root"]
    (tmp_path / "rows").mkdir()
    assert keys(here) == ["tasks.mood.train"]
    (tmp_path / "rows" / "reviews.csv").touch()
    assert keys(here) == []
    assert keys({**here, "base": {"model": "./model"}}) == ["base.model"]
    moved = {**here, "variants": [{"name": "elsewhere", "set": {"data.root": "nowhere"}, "arms": ["kaiming"]}]}
    assert keys(moved) == ["data.root"]
    glue = {**here, "tasks": ["rte", "mnli"]}
    assert keys({**glue, "data": {}}) == []
    assert keys(glue) == ["tasks.mnli.train", "tasks.mnli.validation", "tasks.rte.train", "tasks.rte.validation"]
