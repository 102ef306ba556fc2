"""Heads that are learnt together with a merge's weights, beside heads fitted in closed form and heads left as they were; without labels.

    plait run RECIPE --out RUN        # the recipe stands in docs/results/existing-heads.md
    python benchmarks/learnt_heads.py --base MODEL --data GLUE --adapters RUN/adapters/kaiming --seeds 0,1,2 --out docs/results

`--adapters` holds seed-S/TASK folders as `plait run` writes them. The merge is TSV-M at its default scale, so that heads (and,
where they are learnt, a weight a module) alone differ; they are fitted and learnt on --texts training texts of each task without
their labels. What is scored are --rows validation rows that nothing else reads: shares of what each adapter gains over the base
with its head.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from intervals import t_interval
from judging import task_of

from plait.adapters.peft_format import read_adapter
from plait.border.records import to_json
from plait.disk.store import versions
from plait.evaluation.evaluate import scored_labels
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.score import outputs
from plait.learning.head_learning import with_learnt_heads
from plait.learning.heads import with_heads
from plait.merging import merge
from plait.model.base import BaseModel
from plait.tasks import load_examples
from plait.tasks.metrics import primary, scores

ARMS = ("as they were", "fitted", "learnt")


def one_seed(base: BaseModel, folder: Path, names: list[str], a: argparse.Namespace) -> dict[str, Any]:
    """Scores of the merge of one seed with each kind of heads, of the adapters alone and of the base."""
    root = Path(a.data)
    adapters = [replace(read_adapter(folder / n, name=n), base=a.base) for n in names]
    tasks = {n: task_of(n, root) for n in names}
    texts = {n: load_examples(t, "train", root=root).take(np.arange(a.texts)).texts for n, t in tasks.items()}
    validation = {n: load_examples(t, "validation", root=root) for n, t in tasks.items()}
    rows = {n: e.take(np.arange(min(a.rows, len(e)))) for n, e in validation.items()}  # RTE has 277
    panel = Panel(base, parts_of(adapters), texts, max_length=a.length)
    merged = merge(adapters, "tsv").adapter
    started = time.process_time()
    fitted, _ = with_heads(panel, merged)
    between = time.process_time()
    learnt, seen = with_learnt_heads(panel, merged, {}, steps=a.steps, seed=int(folder.name.rpartition("-")[2]))
    learnt = learnt if seen and seen.kept else fitted  # as `merge auto` has it
    seconds = {"fitted": between - started, "learnt": time.process_time() - between}
    judged = panel.with_texts({n: e.texts for n, e in rows.items()})
    found: dict[str, Any] = {"seen": to_json(seen), "cpu_seconds": seconds, "scores": {}}
    for part in judged.parts:
        labels, metrics = scored_labels(tasks[part.name], rows[part.name]), tasks[part.name].metrics
        arms = [(part.adapter, 1.0), (None, 1.0), (merged, 1.0), (fitted, 1.0), (learnt, 1.0)]
        points = [primary(scores(metrics, logits, labels)) for logits in outputs(judged, part, arms)]
        found["scores"][part.name] = dict(zip(("alone", "base", *ARMS), points, strict=True))
    return found


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """Mean scores; and learnt against fitted, fitted against as they were, with the 95 % t interval over seeds and tasks."""
    tables = [s["scores"] for s in seeds.values()]
    result: dict[str, Any] = {}
    for arm in ("alone", "base", *ARMS):
        result[arm] = float(np.mean([t[n][arm] for t in tables for n in t]))
    for one, other in (("fitted", "as they were"), ("learnt", "fitted"), ("learnt", "as they were")):
        off = t_interval([t[n][one] - t[n][other] for t in tables for n in t])
        result[f"{one} - {other}"] = {"mean": off.mean, "interval": [off.low, off.high]}
    gain = [np.mean([t[n]["alone"] - t[n]["base"] for n in t]) for t in tables]
    for arm in ARMS:
        share = [np.mean([t[n][arm] - t[n]["base"] for n in t]) / g for t, g in zip(tables, gain, strict=True)]
        result[f"recovered, {arm}"] = [float(x) for x in share]
    return result


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "data", "adapters", "out"):
        ap.add_argument(f"--{name}", required=True)
    ap.add_argument("--seeds", default="0,1,2")
    ap.add_argument("--tasks", default="sst2,mrpc,qnli")
    ap.add_argument("--base-4bit", dest="four")
    ap.add_argument("--name", default="existing-heads", help="of the file of results")
    ap.add_argument("--device", default="cpu")
    for name, value in (("texts", 100), ("rows", 400), ("length", 48), ("steps", 100)):
        ap.add_argument(f"--{name}", type=int, default=value)
    a = ap.parse_args()
    out, names = Path(a.out) / f"{a.name}.json", a.tasks.split(",")
    seeds: dict[str, Any] = json.loads(out.read_text())["seeds"] if out.exists() else {}
    for seed in a.seeds.split(","):
        if seed in seeds:
            continue
        base = BaseModel(a.base, device=a.device, four_bits=a.four)
        seeds[seed] = one_seed(base, Path(a.adapters) / f"seed-{seed}", names, a)
        settings = {k: getattr(a, k) for k in ("tasks", "texts", "rows", "length", "steps", "four", "device")}
        document = {
            "command": "benchmarks/learnt_heads.py",
            "settings": settings,
            "versions": versions(),
            **summary(seeds),
            "seeds": seeds,
        }
        out.write_text(json.dumps(document, indent=1) + "\n")
        print(seed, json.dumps(seeds[seed]), flush=True)


if __name__ == "__main__":
    main()
