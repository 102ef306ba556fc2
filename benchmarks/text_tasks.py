"""Sixteen tasks for a decoder, every answer written: ten of labels as words, six that generate; as parquet, ready for a study.

    python benchmarks/text_tasks.py --data DATA --to DIR [--glue GLUE]

DATA holds open/ (snli, banking77, clinc_domain) and text/ (gsm8k, wikisql, snips, squad, e2e_nlg, disfl_qa), see their READMEs. DIR gets
TASK/train.parquet and TASK/validation.parquet with three columns: `told` (the task's instruction, then the text with the task's own
cue), `bare` (the text alone; every task ends in the same "Answer:"), `answer`. Rows are drawn by seed 0: at most 6,000
and 600; of GSM8K those with answers of at most 350 characters. These nine are the tasks of recipes/studies/text-qwen15.yaml.

GLUE, by default DATA/glue, adds seven tasks in the same columns (at most 1,200 training rows): sst2, qnli, rte, qqp, mnli, cola, and stsb
as whole numbers from 0 to 5. MRPC is left out: its sentences are the general text of the studies. `e2e_nlg_references/validation.parquet`
is E2E's validation with a fourth column, `references`: all that people wrote of the same data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from pyarrow import parquet

GENERATING = ("gsm8k", "wikisql", "snips", "squad", "e2e_nlg", "disfl_qa")
LABELLED = {
    "snli": (
        "validation",
        "premise,hypothesis",
        "Is the second sentence true, open or false, given the first? Answer in one word.",
    ),
    "banking77": ("test", "sentence", "Name what this customer of a bank asks about, in a few words."),
    "clinc_domain": (
        "validation",
        "sentence",
        "Which domain is this request of: car, banking, credit cards, home, food, settings, small talk, travel, utility or work?",
    ),
}
GLUED = {
    "sst2": (
        "validation",
        "sentence",
        "Is this review negative or positive? Answer in one word.",
        ("negative", "positive"),
    ),
    "qnli": (
        "validation",
        "question,sentence",
        "Does the sentence answer the question? Answer yes or no.",
        ("yes", "no"),
    ),
    "rte": (
        "validation",
        "sentence1,sentence2",
        "Does the second text follow from the first? Answer yes or no.",
        ("yes", "no"),
    ),
    "qqp": (
        "validation",
        "question1,question2",
        "Do both ask the same? Answer same or different.",
        ("different", "same"),
    ),
    "mnli": (
        "validation_matched",
        "premise,hypothesis",
        "Does the second sentence follow from the first? Answer yes, maybe or no.",
        ("yes", "maybe", "no"),
    ),
    "cola": (
        "validation",
        "sentence",
        "Is this sentence acceptable English? Answer acceptable or unacceptable.",
        ("unacceptable", "acceptable"),
    ),
    "stsb": (
        "validation",
        "sentence1,sentence2",
        "How alike are the two sentences, from 0 to 5? Answer with a whole number.",
        (),
    ),
}  # file, columns, instruction, words of the labels in their order; none: the nearest whole number
CUE = "Answer:"
LONGEST = {
    "gsm8k": 350
}  # characters of an answer, about 110 tokens: writing longer ones takes most of the time of all tasks
ROWS = {"train": 6000, "validation": 600}
ROWS_OF_GLUE = {"train": 1200, "validation": 600}
NAMES = Path(__file__).parents[1] / "recipes" / "studies" / "text3-smollm2.yaml"


def names_of(task: str) -> list[str]:
    """A labelled task's answers as words, as the small decoder's study has them."""
    study = yaml.safe_load(NAMES.read_text())
    return next(t["labels"] for t in study["tasks"] if t["name"] == task)


def labelled(task: str, split: str, data: Path) -> list[dict[str, str]]:
    """Rows of a task of labels."""
    held_out, columns, instruction = LABELLED[task]
    file = data / "open" / task / f"{'train' if split == 'train' else held_out}.parquet"
    names = names_of(task)
    rows = []
    for row in parquet.read_table(file).to_pylist():
        text = "\n".join(row[c] for c in columns.split(","))
        cued = f"{text}\n{CUE}"
        rows.append({"told": f"{instruction}\n{cued}", "bare": cued, "answer": names[row["label"]]})
    return rows


def glued(task: str, split: str, glue: Path) -> list[dict[str, str]]:
    """Rows of a GLUE task, its labels as words; STS-B's at the nearest whole number, halves upwards."""
    held_out, columns, instruction, words = GLUED[task]
    rows = []
    for row in parquet.read_table(glue / task / f"{'train' if split == 'train' else held_out}.parquet").to_pylist():
        cued = "\n".join((*(row[c].strip() for c in columns.split(",")), CUE))
        answer = words[row["label"]] if words else str(int(row["label"] + 0.5))
        rows.append({"told": f"{instruction}\n{cued}", "bare": cued, "answer": answer})
    return rows


def generating(task: str, split: str, data: Path, more: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a task that generates: its cue is the last line of the prompt; `more` names columns that are taken along."""
    rows = []
    for row in parquet.read_table(data / "text" / task / f"{split}.parquet").to_pylist():
        if len(row["answer"]) > LONGEST.get(task, 10_000):
            continue
        body = row["prompt"].rsplit("\n", 1)[0]
        told = f"{row['instruction']}\n{row['prompt']}"
        rows.append({"told": told, "bare": f"{body}\n{CUE}", "answer": row["answer"], **{c: row[c] for c in more}})
    return rows


def write(rows: list[dict[str, Any]], most: int, to: Path) -> int:
    """Draw and write rows."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:most])
    to.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist([rows[i] for i in chosen]), to, compression="zstd", compression_level=19)
    return len(chosen)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, type=Path)
    p.add_argument("--to", required=True, type=Path)
    p.add_argument("--glue", type=Path, help="folder of the GLUE tasks; by default DATA/glue")
    a = p.parse_args()
    for task in (*LABELLED, *GENERATING):
        read = labelled if task in LABELLED else generating
        for split, most in ROWS.items():
            count = write(read(task, split, a.data), most, a.to / task / f"{split}.parquet")
            print(task, split, count)
    for task in GLUED:
        for split, most in ROWS_OF_GLUE.items():
            print(
                task,
                split,
                write(glued(task, split, a.glue or a.data / "glue"), most, a.to / task / f"{split}.parquet"),
            )
    several = generating("e2e_nlg", "validation", a.data, ("references",))
    print("e2e_nlg_references", write(several, ROWS["validation"], a.to / "e2e_nlg_references" / "validation.parquet"))


if __name__ == "__main__":
    main()
