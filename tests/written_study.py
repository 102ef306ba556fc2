"""A study of written tasks as small as it can be: a base of random weights, two tasks, a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from tests import tiny


def make(folder: Path, arms: list[Any]) -> Path:
    """Write base, rows, general texts and small.yaml into a folder.

    Args:
        folder: There already.
        arms: Of the recipe.

    Returns:
        The recipe.
    """
    tiny.save_model(folder / "base", "llama")
    for task, words in (("one", ("w1", "w2")), ("two", ("w3", "w4"))):
        (folder / task).mkdir()
        for split, n in (("train", 24), ("validation", 24)):
            rows = {
                "told": [f"w50 {words[i % 2]} w{i + 5}" for i in range(n)],
                "answer": [words[i % 2] for i in range(n)],
            }
            rows["bare"] = [t.removeprefix("w50 ") for t in rows["told"]]
            parquet.write_table(pa.table(rows), folder / task / f"{split}.parquet")
    parquet.write_table(pa.table({"text": ["w5 w6", "w7 w8", "w9 w10"]}), folder / "general.parquet")
    task = {"kind": "causal", "text": ["told"], "label": "answer", "compare": "case", "stop": "\n"}
    recipe = {
        "name": "small", "base": {"model": str(folder / "base")},
        "data": {"root": str(folder), "train_rows": 24, "validation_rows": 24, "max_length": 24},
        "tasks": [
            {"name": n, **task, "train": f"{n}/train.parquet", "validation": f"{n}/validation.parquet"} for n in ("one", "two")
        ],
        "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
        "statistics": {"samples": 8, "pool": "token", "batch_size": 8}, "training": {"steps": 4, "batch_size": 4, "lr": 0.01},
        "rates": [0.01], "seeds": [1], "tuning_rows": 4, "grid_rows": 4,
        "arms": arms, "merges": ["task_arithmetic", "tsv", "regmean"],
    }  # fmt: skip
    (folder / "small.yaml").write_text(json.dumps(recipe))
    return folder / "small.yaml"
