"""The shipped study at its smallest, on real weights and texts: MiniLM, two tasks, one seed."""

from __future__ import annotations

import json
import math

import pytest

from plait.cli import main
from plait.demo.run import DATA, demo_base, demo_recipe
from plait.errors import EnvironmentFault

SMALL = {
    "base.model": None,
    "base.dtype": "float32",
    "data": {"root": str(DATA), "train_rows": 96, "validation_rows": 60, "max_length": 32},
    "training": {"steps": 12, "batch_size": 8, "lr": 0.001, "warmup_ratio": 0.05},
    "statistics.samples": 40,
    "rates": [0.003],
    "moments": [],
    "tuning_merges": ["task_arithmetic", "tsv"],
    "seeds": [0],
    "tuning_rows": 10,
    "grid_rows": 12,
    "background": [],
    "variants": [],
    "repair": None,
    "arms": [
        "kaiming",
        {"name": "contrastive", "options": {"rho": 0.001}},
        {
            "name": "contrastive_penalised",
            "subspace": "contrastive",
            "options": {"rho": 0.001},
            "like": "contrastive",
            "training": {"constraint": "penalised"},
        },
    ],
    "merges": [{"name": n, "scales": [0.5, 1.0]} for n in ("task_arithmetic", "tsv")],
}


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    found = capsys.readouterr()
    assert ended.value.code == 0, found.err
    return found.out


def test_two_tasks_of_minilm_from_statistics_to_table(tmp_path, capsys):
    try:
        base = demo_base()
    except EnvironmentFault as e:
        pytest.skip(str(e))
    tasks = [t.model_dump(mode="json", exclude_none=True) for t in demo_recipe().tasks if t.name in ("snli", "stsb")]
    sets = {**SMALL, "base.model": str(base), "tasks": tasks}
    given = [x for key, value in sets.items() for x in ("--set", f"{key}={json.dumps(value)}")]
    said(capsys, "study", "run", "studies/glue8-minilm", "--out", tmp_path / "study", "--quiet", *given)
    said(capsys, "study", "table", tmp_path / "study", "--to", tmp_path)
    table = json.loads((tmp_path / "glue8-minilm.json").read_text())
    assert {(r["arm"], r["method"]) for r in table["rows"]} == {
        (a, m["name"]) for a in ("kaiming", "contrastive", "contrastive_penalised") for m in SMALL["merges"]
    }
    for row in table["rows"]:
        assert row["seed"] == 0 and all(math.isfinite(row[k]) for k in ("floor", "individual", "merged", "recovered"))
    learnt = {r["arm"]: r["individual"] for r in table["rows"]}
    assert learnt["contrastive"] > table["rows"][0]["floor"] + 1
