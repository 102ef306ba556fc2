"""Does how sure a merge is of itself decide which merge is chosen? Merges are chosen on some texts and judged on labelled rows.

    python benchmarks/sureness.py BASE DATA NAME=TASK=ADAPTER ... [--out FILE.json]

DATA holds TASK.train.parquet and TASK.validation.parquet (or TASK/train.parquet and TASK/validation.parquet) with a column `label`; all
other columns of text are read. NAMEs may share a TASK: two seeds of one training say much the same. Every method and scale is scored on
texts of the training rows; the choice by each rule is made `--draws` times, on texts drawn with replacement, and judged on validation rows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from plait.adapters.peft_format import read_adapter
from plait.choosing.candidates import METHODS, merged_by, recipes
from plait.fidelity.measure import Fidelity, closeness, task_fidelity
from plait.fidelity.moments import collect_moments, merged_kinds
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.score import outputs
from plait.model.base import BaseModel

SCALES = (0.4, 0.6, 0.9, 1.3, 2.0, 2.8)
WITHIN = 0.01  # of the best by `followed`: what a tie-break by the divergence would choose among


def rules(fidelities: list[Fidelity]) -> dict[str, np.ndarray]:
    """Score every merge by every rule."""
    uncapped = [Fidelity.of([replace(t, capped=None) for t in f.tasks]) for f in fidelities]
    probability, kept = (np.array(x) for x in ([f.score for f in uncapped], [f.kept for f in fidelities]))
    return {
        "probability": probability,
        "probability, no more than the adapter's own": np.array([f.score for f in fidelities]),
        f"probability; within {WITHIN} of the best by KL": np.where(probability >= probability.max() - WITHIN, kept, -np.inf),
        "KL over the base's": kept,
        "agreement": np.array([np.mean([t.agreement for t in f.tasks]) for f in fidelities]),
    }  # fmt: skip


def rows_of(data: Path, task: str, split: str, most: int, seed: int) -> tuple[tuple[tuple[str, ...], ...], np.ndarray]:
    """Texts and labels of some rows."""
    places = [
        data / f"{task}.{split}.parquet",
        data / task / f"{split}.parquet",
        data / task / f"{split}_matched.parquet",
    ]
    table = pq.read_table(next(p for p in places if p.is_file()))
    table = table.take(np.random.default_rng(seed).permutation(table.num_rows)[:most])
    columns = [
        table[f.name].to_pylist()
        for f in table.schema
        if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)
    ]
    return tuple(zip(*columns, strict=True)), table["label"].to_numpy()


def fidelities_of(answers, kinds, rows) -> list[Fidelity]:
    """Fidelity of every merge on some rows of each task: own, base and merges' answers in `answers`."""
    per_task = {}
    for task, (own, base, *merges) in answers.items():
        at = rows[task]
        bare = closeness(kinds[task], own[at], base[at])
        per_task[task] = [task_fidelity(task, closeness(kinds[task], own[at], m[at]), bare, len(at)) for m in merges]
    return [Fidelity.of(tasks) for tasks in zip(*per_task.values(), strict=True)]


def truth(kind: str, answers: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy; of a regression the correlation."""
    if kind == "regression":
        return max(0.0, float(np.corrcoef(answers.ravel(), labels)[0, 1]))
    return float((answers.argmax(-1) == labels).mean())


def main() -> None:
    """Answer for one set of adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    named = [text.split("=", 2) for text in a.adapters]
    task_of = {name: task for name, task, _ in named}
    adapters = [_one_head(read_adapter(Path(folder), name=name), name) for name, _, folder in named]
    texts = {n: rows_of(a.data, t, "train", a.texts, a.seed + i)[0] for i, (n, t) in enumerate(task_of.items())}
    held = {n: rows_of(a.data, t, "validation", a.rows, 0) for n, t in task_of.items()}
    panel = Panel(BaseModel(a.base, device="cpu"), parts_of(adapters), texts, max_length=64)
    moments = collect_moments(panel)
    made = [(r.label, merged_by(r, adapters, moments)) for r in recipes(merged_kinds(moments), a.methods.split(","))]
    entries = [(label, merge, s) for label, merge in made for s in SCALES]
    active = [(None, 1.0), *((merge, s) for _, merge, s in entries)]
    kinds = {p.name: p.task.kind for p in panel.parts}

    def asked(rows):
        here = panel.with_texts(rows, general=False)
        return {p.name: [np.asarray(x) for x in outputs(here, p, [(p.adapter, 1.0), *active])] for p in here.parts}

    chosen_on, judged_on = asked(texts), asked({n: rows for n, (rows, _) in held.items()})
    there = fidelities_of(judged_on, kinds, {n: np.arange(len(held[n][1])) for n in held})
    true = [np.mean([truth(kinds[n], judged_on[n][i + 2], held[n][1]) for n in held]) for i in range(len(entries))]
    generator, found = np.random.default_rng(0), {}
    for _ in range(a.draws):
        drawn = {n: generator.integers(0, len(rows), len(rows)) for n, rows in texts.items()}
        for rule, scores in rules(fidelities_of(chosen_on, kinds, drawn)).items():
            found.setdefault(rule, []).append(int(scores.argmax()))
    result = {rule: _judged(places, entries, there, true) for rule, places in found.items()}
    alone = float(np.mean([truth(kinds[n], judged_on[n][0], held[n][1]) for n in held]))
    print(f"adapters alone: {alone:.4f}")
    for rule, row in result.items():
        print(
            f"{rule:48s} true {row['true']:.4f}  agreement {row['agreement']:.4f}  KL {row['kl']:.4f}  mostly {row['mostly']}"
        )
    if a.out:
        a.out.write_text(
            json.dumps({"adapters": [f"{n}={t}" for n, t, _ in named], "alone": alone, "rules": result}, indent=1)
            + "\n"
        )


def _one_head(adapter, name):
    """The adapter, its one head named after it."""
    head, facts = next(iter(adapter.heads.values())), next(iter(adapter.head_facts.values()), None)
    return replace(adapter, heads={name: head}, head_facts={name: facts} if facts else {})


def _judged(places, entries, there, true):
    """What the choices are worth on rows that nobody chose by."""
    most = max(set(places), key=places.count)
    return {
        "true": float(np.mean([true[i] for i in places])),
        "agreement": float(np.mean([np.mean([t.agreement for t in there[i].tasks]) for i in places])),
        "kl": float(np.mean([np.mean([t.kl for t in there[i].tasks]) for i in places])),
        "mostly": f"{entries[most][0]} at {entries[most][2]:g} ({places.count(most) / len(places):.0%})",
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
