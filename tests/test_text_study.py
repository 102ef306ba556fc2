"""The study of written tasks, small: arms trained, merged and scored, the merge of what exists, and the page made of them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import written_study

ROOT = Path(__file__).parents[1]
ARMS = ("kaiming", "contrastive")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder with a base of random weights, two tasks and a recipe."""
    folder = tmp_path_factory.mktemp("study")
    written_study.make(folder, list(ARMS))
    return folder


def call(folder: Path, script: str, *arguments: str) -> None:
    paths = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'benchmarks'}"}
    asked = [
        "--study",
        str(folder / "small.yaml"),
        "--out",
        str(folder / "run"),
        "--general",
        f"{folder / 'general.parquet'}:text",
    ]
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "benchmarks" / script), *asked, "--rows", "4", *arguments],
        check=False, env={**os.environ, **paths}, capture_output=True, text=True, cwd=folder, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_study_runs_whole(study):
    call(study, "text_arms.py", "--do", "train:1 fixed:1 curves:1:kaiming nodata:1:kaiming")
    call(
        study,
        "text_auto.py",
        "--seed",
        "1",
        "--texts",
        "12",
        "--new-tokens",
        "3",
        "--steps",
        "2",
        "--scales",
        "0.6",
        "--batch",
        "12",
    )
    records = {f.stem: json.loads(f.read_text()) for f in (study / "run" / "records").glob("*.json")}
    assert set(records) == {
        "fixed-1-kaiming", "fixed-1-contrastive", "curves-1-kaiming", "nodata-1-kaiming", "auto_written-1-kaiming",
    }  # fmt: skip
    ladders = records["nodata-1-kaiming"]["methods"]
    assert {"iso_c", "wudi", "core_space, isotropic"} <= set(ladders)
    assert len(ladders["wudi"]["scores"]) == 6 and not records["nodata-1-kaiming"]["crossed"]
    assert records["fixed-1-kaiming"]["tasks"] == ["one", "two"] and records["fixed-1-kaiming"]["floor"] is not None
    assert {"task_arithmetic", "iso_c"} <= set(records["fixed-1-kaiming"]["merges"])
    assert set(records["auto_written-1-kaiming"]["steps"]) == {
        "no text",
        "chosen",
        "weights learnt",
        "fitted",
        "repaired",
    }
    assert all(
        len(s["scores"]) == 2 and len(s["scores"][0]) == 2 for s in records["auto_written-1-kaiming"]["steps"].values()
    )
    ends = records["auto_written-1-kaiming"]
    assert all(len(ends[k]) == 2 and len(ends[k][0]) == 2 for k in ("alone", "floor"))
    chosen = records["auto_written-1-kaiming"]["steps"]["chosen"]
    assert chosen["scale"] > 0 and chosen["recipe"]  # recorded, and folded in once
    before = {f: f.stat().st_mtime_ns for f in (study / "run" / "records").glob("*.json")}
    call(study, "text_arms.py", "--do", "train:1 fixed:1")  # what is there is not done again
    assert all(f.stat().st_mtime_ns == t for f, t in before.items())


def test_what_merges_cost_outside_their_tasks(study):
    """A task that nobody trained, and perplexity of the general texts: of the bare base what it is by itself."""
    recipe = json.loads((study / "small.yaml").read_text())
    (study / "other.yaml").write_text(json.dumps({**recipe, "tasks": [{**recipe["tasks"][0], "name": "three"}]}))
    call(
        study, "text_arms.py", "--do", "train:1:kaiming price:1:kaiming", "--elsewhere", f"{study / 'other.yaml'}:three"
    )
    found = json.loads((study / "run" / "records" / "price-1-kaiming.json").read_text())
    assert (
        found["tasks"] == ["three"] and set(found["alone"]) == {"one", "two"} and "task_arithmetic" in found["merges"]
    )
    model = AutoModelForCausalLM.from_pretrained(study / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(study / "base")
    loss, count = 0.0, 0
    for text in ("w5 w6", "w7 w8", "w9 w10"):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert (
        found["base"]["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-3)
        and found["base"]["general_kl"] == 0.0
    )
    assert found["merges"]["task_arithmetic at 1"]["perplexity"] != found["base"]["perplexity"]
    assert all(r["general_kl"] > 0 for r in found["alone"].values())
