"""The rows and recipes of the written tasks: GLUE as words, and sixteen tasks that hold the nine."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rows_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("text_tasks", ROOT / "benchmarks" / "text_tasks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tasks_of(study: str) -> dict[str, dict[str, object]]:
    recipe = yaml.safe_load((ROOT / "recipes" / "studies" / f"{study}.yaml").read_text())
    return {t["name"]: t for t in recipe["tasks"]}


def test_glue_is_asked_in_words_under_one_cue(rows_script, tmp_path):
    tables = {
        "rte": ("validation", {"sentence1": ["It rained. "], "sentence2": ["It was dry."], "label": [1]}),
        "mnli": ("validation_matched", {"premise": ["a"], "hypothesis": ["b"], "label": [2]}),
        "stsb": ("validation", {"sentence1": ["a"] * 4, "sentence2": ["b"] * 4, "label": [0.49, 2.5, 3.4, 5.0]}),
    }
    for task, (file, columns) in tables.items():
        (tmp_path / task).mkdir()
        parquet.write_table(pa.table(columns), tmp_path / task / f"{file}.parquet")
    (rte,) = rows_script.glued("rte", "validation", tmp_path)
    assert rte["bare"] == "It rained.\nIt was dry.\nAnswer:" and rte["answer"] == "no"
    assert rte["told"].split("\n", 1)[1] == rte["bare"] and rte["told"].endswith(rows_script.CUE)
    assert [r["answer"] for r in rows_script.glued("mnli", "validation", tmp_path)] == ["no"]
    assert [r["answer"] for r in rows_script.glued("stsb", "validation", tmp_path)] == ["0", "3", "3", "5"]


def test_sixteen_tasks_are_the_nine_and_seven_of_glue(rows_script):
    nine, sixteen, wide = (tasks_of(f"text-qwen15{s}") for s in ("", "-16", "-wide"))
    assert wide == nine and len(sixteen) == 16 and list(sixteen)[:9] == list(nine)
    assert set(sixteen) - set(nine) == set(rows_script.GLUED)
    assert {t for t in nine if sixteen[t] != nine[t]} == {"snips", "e2e_nlg"}
    assert sixteen["snips"]["metrics"] == ["slot_f1"] and sixteen["e2e_nlg"]["references"] == "references"
