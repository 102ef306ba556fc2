r"""Inputs of benchmarks/half_hour.sh as small as they can be: two models of random weights, sixteen written tasks, eleven others.

python -m tests.half_hour DIR     # prints MODEL=DIR/model SMALLER=DIR/model SMOL=DIR/model TASKS=DIR/tasks GLUE=DIR/glue MPNET=DIR/mpnet \
                                  # TOKENIZER=DIR/model GENERAL=DIR/general.parquet:text
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml
from pyarrow import parquet

from plait.tasks import GLUE_TASKS, glue_task
from tests import tiny

STUDY = Path(__file__).parents[1] / "recipes" / "studies" / "text-qwen15-16.yaml"
ROWS = 24


def write(file: Path, columns: dict[str, list[object]]) -> None:
    """Write a table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), file)


def written_tasks(root: Path) -> None:
    """The rows of every task of the study of sixteen; each asks for one of two words of its own."""
    for i, task in enumerate(yaml.safe_load(STUDY.read_text())["tasks"]):
        words = (f"w{2 * i}", f"w{2 * i + 1}")
        for split in ("train", "validation"):
            answers: list[object] = [words[n % 2] for n in range(ROWS)]
            if "slot_f1" in task.get("metrics", ()):
                answers = [json.dumps({words[n % 2]: words[0]}) for n in range(ROWS)]
            if "extract" in task:
                answers = [f"{words[n % 2]} #### {n % 2}" for n in range(ROWS)]
            bare: list[object] = [f"{words[n % 2]} w{40 + n % 15}" for n in range(ROWS)]
            told: list[object] = [f"w{32 + i % 8} {t}" for t in bare]
            columns = {"told": told, "bare": bare, "answer": answers}
            write(root / task["name"] / f"{split}.parquet", columns)
            if task.get("references") and split == "validation":
                write(root / task[split], {**columns, task["references"]: [[a] for a in answers]})


def glue(root: Path) -> None:
    """GLUE's tasks with the columns that they have, labels drawn."""
    rng = np.random.default_rng(0)
    for name in GLUE_TASKS:
        task = glue_task(name, root)
        classes = len(task.labels or ()) or 2
        for source in (task.source.train, task.source.validation):
            rows: dict[str, list[object]] = {
                c: [" ".join(f"w{w}" for w in rng.integers(0, 60, 6)) for _ in range(ROWS)] for c in task.text_columns
            }
            values = rng.uniform(0, 5, ROWS) if task.kind == "regression" else np.arange(ROWS) % classes
            write(root / Path(str(source)).relative_to(root), {**rows, task.label_column: values.tolist()})
    for name, columns, split in (
        ("snli", ("premise", "hypothesis"), "validation"),
        ("banking77", ("sentence",), "test"),
        ("clinc_domain", ("sentence",), "validation"),
    ):  # fmt: skip
        for part in ("train", split):
            texts: dict[str, list[object]] = {c: [f"w{n % 60} w{n % 7}" for n in range(ROWS)] for c in columns}
            write(root / name / f"{part}.parquet", {**texts, "label": (np.arange(ROWS) % 3).tolist()})


def make(root: Path) -> dict[str, str]:
    """Write everything into a folder.

    Returns:
        What the script's environment is to say.
    """
    tiny.save_model(root / "model", "llama")
    tiny.save_model(root / "mpnet", "mpnet")
    written_tasks(root / "tasks")
    glue(root / "glue")
    write(root / "general.parquet", {"text": ["w5 w6 w7", "w7 w8", "w9 w10 w11"]})
    named = {k: str(root / k.lower()) for k in ("MODEL", "TASKS", "GLUE", "MPNET")}
    return {
        **named,
        "TOKENIZER": named["MODEL"],
        "SMALLER": named["MODEL"],
        "SMOL": named["MODEL"],
        "GENERAL": f"{root / 'general.parquet'}:text",
    }


if __name__ == "__main__":
    sys.stdout.write(" ".join(f"{k}={v}" for k, v in make(Path(sys.argv[1]).absolute()).items()) + "\n")
