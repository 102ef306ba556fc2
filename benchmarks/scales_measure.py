"""How the best scale of a merge depends on method, number of tasks and how the adapters were trained: true scores over a ladder of scales.

    python benchmarks/scales_measure.py --base MODEL --data DATA --adapters RUN/adapters/kaiming --seeds 3,4 --out FILE.json

`--adapters` holds seed-S/TASK folders as `plait run` writes them. For every seed and every subset of tasks, each method is
merged once and scored by labels at every scale, on two halves of the validation rows. FILE.json holds one record for each
subset: `scores` is (methods, scales, halves, tasks) in percent; `floor` and `alone` are (halves, tasks). Beside them stand, for
every method and kind of moments, three sums over modules and their inputs: a = tr(D_t m_t D_t^T), b = tr(D_t m_t D^T) and
c = tr(D m_t D^T), each divided by tr(W0 m_t W0^T) of its module, from which scales without labels can be tried on paper.
`benchmarks/scales.py` makes the table of it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from judging import Judge, task_of

from plait.adapters.lora import Adapter
from plait.adapters.peft_format import read_adapter
from plait.choosing.candidates import Recipe, merged_by
from plait.evaluation.features import features
from plait.fidelity.moments import collect_moments
from plait.fidelity.panel import Panel, parts_of
from plait.model.base import BaseModel
from plait.statistics.moments import Statistics
from plait.tasks import load_examples

TASKS = "cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte,snli,banking77,clinc_domain"
SCALES = tuple(0.125 * 2 ** (i / 2) for i in range(11))
RECIPES = (
    *(Recipe(m) for m in ("task_arithmetic", "ties", "dare_ties", "knots", "tsv", "iso_c", "core_space")),
    *(Recipe(m, "pico") for m in ("task_arithmetic", "tsv")),
    *(Recipe(m, None, kind) for m in ("regmean", "least_squares") for kind in ("base", "own")),
    Recipe("regmean", "pico", "own"),
)
COUNTS = ((2, 3), (3, 3), (4, 2), (6, 2))  # how many tasks, how many subsets of that many


def subsets(names: Sequence[str], seed: int) -> list[tuple[str, ...]]:
    """Random subsets, the first eight tasks, and all."""
    rng = random.Random(seed)
    drawn = [
        tuple(sorted(rng.sample(list(names), n), key=list(names).index))
        for n, k in COUNTS
        if n < len(names)
        for _ in range(k)
    ]
    return [*dict.fromkeys([*drawn, tuple(names[:8]), tuple(names)])]


def energies(
    merged: Adapter, adapters: Sequence[Adapter], stats: Mapping[str, Statistics], dense: Mapping[tuple[str, str], Any]
) -> dict[str, list[float]]:
    """Task -> [a, b, c], summed over modules."""
    found: dict[str, list[float]] = {}
    for adapter in adapters:
        total = np.zeros(3)
        for module, own in adapter.modules.items():
            whole = stats[adapter.name].modules[module].output_energy
            factor = dense[adapter.name, module]
            d, m = own.folded(), merged.modules[module].folded()
            pairs = [(d, d), (d, m), (m, m)]
            total += [
                float(((x.B.double().T @ y.B.double()) * (x.A.double() @ factor @ y.A.double().T)).sum()) / whole
                for x, y in pairs
            ]
        found[adapter.name] = [float(v) for v in total]
    return found


def one_subset(
    base: BaseModel, adapters: list[Adapter], tasks, validation, moments, a: argparse.Namespace
) -> dict[str, Any]:
    """Scores of every method at every scale over these adapters."""
    started = time.perf_counter()
    names = [x.name for x in adapters]
    panel = Panel(base, parts_of(adapters), {n: validation[n].texts[:1] for n in names}, max_length=a.length)
    judge = Judge(panel, {n: tasks[n] for n in names}, {n: validation[n] for n in names}, a.rows)
    own = {kind: {n: by[n] for n in names} for kind, by in moments.items()}
    merges = [merged_by(r, adapters, own) for r in RECIPES]
    second = {
        kind: {(x.name, m): by[x.name].moments_for(m).dense().double() for x in adapters for m in x.modules}
        for kind, by in own.items()
    }
    merged = time.perf_counter()
    worn = [(m, s) for m in merges for s in a.scales]
    alone = {x.name: (x, 1.0) for x in adapters}
    scored = judge.scores([alone, (None, 1.0), *worn])
    return {
        "tasks": names,
        "methods": [r.label for r in RECIPES],
        "scales": list(a.scales),
        "alone": scored[0].round(3).tolist(),
        "floor": scored[1].round(3).tolist(),
        "scores": scored[2:].reshape(len(merges), len(a.scales), 2, -1).round(3).tolist(),
        "energies": {kind: [energies(m, adapters, by, second[kind]) for m in merges] for kind, by in own.items()},
        "features": features({x.name: x for x in adapters}, own["base"]),
        "seconds": [merged - started, time.perf_counter() - merged],
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True)
    p.add_argument("--data", required=True, type=Path)
    p.add_argument("--adapters", required=True, type=Path)
    p.add_argument("--tasks", default=TASKS)
    p.add_argument("--seeds", default="3,4")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="auto")
    p.add_argument("--texts", type=int, default=100)
    p.add_argument("--rows", type=int, default=200, help="validation rows of each half and task")
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--scales", type=lambda t: tuple(map(float, t.split(","))), default=SCALES)
    p.add_argument("--most", type=int, default=0, help="stop after so many subsets of a seed; 0 for all")
    a = p.parse_args()
    base, root, names = BaseModel(a.base, dtype=a.dtype, device=a.device), a.data.absolute(), a.tasks.split(",")
    tasks = {n: task_of(n, root) for n in names}
    validation = {n: load_examples(tasks[n], "validation", root=root) for n in names}
    records = json.loads(a.out.read_text()) if a.out.exists() else []
    done = {(r["seed"], tuple(r["tasks"])) for r in records}
    for seed in map(int, a.seeds.split(",")):
        adapters = {n: read_adapter(a.adapters / f"seed-{seed}" / n, name=n) for n in names}
        texts = {n: load_examples(tasks[n], "train", root=root, rows=a.texts, seed=1000 + seed).texts for n in names}
        moments = collect_moments(Panel(base, parts_of(list(adapters.values())), texts, max_length=a.length))
        for subset in reversed(subsets(names, seed)[-a.most :]):
            if (seed, subset) in done:
                continue
            record = one_subset(base, [adapters[n] for n in subset], tasks, validation, moments, a)
            records.append({"arm": a.adapters.name, "seed": seed, **record})
            a.out.write_text(json.dumps(records) + "\n")
            print(seed, len(subset), [round(s, 1) for s in record["seconds"]], flush=True)


if __name__ == "__main__":
    main()
