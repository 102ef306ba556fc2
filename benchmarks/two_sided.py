"""What the output side adds to a merge: MaTS beside RegMean, true scores at several scales and MaTS's own objective.

    plait run RECIPE --out RUN                     # with `statistics: {output_gradients: true}`, an arm `kaiming`
    python benchmarks/two_sided.py --recipe RECIPE --run RUN --rows 60

For every variant: the scale that the statistics say, and the gains of the adapters that are kept at it (mean over tasks of the scores,
from the bare base with each task's head to the adapters alone), at shorter and longer scales, and where halves of the validation
rows take turns in choosing the scale and reporting. `objective` is the mean over modules of sum_t tr(G_t (D - D_t) M_t (D - D_t)^T), 1
for D = 0.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from existing import Judge

from plait.adapters.lora import Adapter
from plait.adapters.peft_format import read_adapter
from plait.fidelity.panel import Panel, parts_of
from plait.merging import merge
from plait.recipes.recipe_file import read_recipe
from plait.runs.session import Session
from plait.statistics import Statistics, read_statistics

VARIANTS = {
    "regmean": ("regmean", {}),
    "mats": ("mats", {}),
    "mats, alpha 0.5": ("mats", {"alpha": 0.5}),
    "mats, alpha 0.1": ("mats", {"alpha": 0.1}),
}
FACTORS = (0.65, 1.0, 1.5)  # of the scale that the statistics say


def objective(merged: Adapter, adapters: list[Adapter], statistics: dict[str, Statistics]) -> float:
    """MaTS's sum at a merge of scale 1 over that at no update, mean over modules; moments as they are, traces divided out."""
    shares = []
    for module, found in merged.modules.items():
        D, left, whole = found.delta(torch.float64), 0.0, 0.0
        for adapter in adapters:
            own = adapter.modules[module].delta(torch.float64)
            known = statistics[adapter.name]
            G, M = (
                m.normalised(torch.float64) for m in (known.output_gradients_for(module), known.moments_for(module))
            )
            left += float(((G @ (D - own)) * ((D - own) @ M)).sum())
            whole += float(((G @ own) * (own @ M)).sum())
        shares.append(left / whole)
    return float(np.mean(shares))


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=60, help="of each half of each task's validation rows; 0 for all")
    a = parser.parse_args()
    session = Session(read_recipe(a.recipe))
    names = list(session.tasks)
    adapters = [read_adapter(a.run / f"adapters/kaiming/seed-{a.seed}" / n, name=n) for n in names]
    statistics = {n: read_statistics(a.run / f"statistics/seed-{a.seed}/{n}.stats.safetensors") for n in names}
    validation = {n: session.validation(n) for n in names}
    length = session.recipe.data.max_length
    panel = Panel(session.base, parts_of(adapters), {n: e.texts for n, e in validation.items()}, max_length=length)
    merged = {v: merge(adapters, m, statistics=statistics, options=o) for v, (m, o) in VARIANTS.items()}
    worn = [(m.adapter, f) for m in merged.values() for f in FACTORS]
    judge = Judge(panel, session.tasks, validation, a.rows)
    alone, bare, *scores = judge.scores([{x.name: (x, 1.0) for x in adapters}, (None, 0.0), *worn]).mean(-1)
    kept = (np.array(scores) - bare) / (alone - bare)  # (merges, halves)
    report = {"tasks": names, "alone": alone.mean(), "bare": bare.mean(), "factors": FACTORS}
    for i, (name, m) in enumerate(merged.items()):
        mine = kept[i * len(FACTORS) : (i + 1) * len(FACTORS)]
        plain = merge(adapters, VARIANTS[name][0], statistics=statistics, options=VARIANTS[name][1], scale=1.0)
        report[name] = {
            "scale": m.record.scale,
            "kept": [round(float(k), 3) for k in mine.mean(1)],
            "chosen": round(float(np.mean([mine[mine[:, h].argmax(), 1 - h] for h in (0, 1)])), 3),
            "objective": round(objective(plain.adapter, adapters, statistics), 3),
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
