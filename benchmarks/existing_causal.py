"""Adapters of a small language model merged by fidelity alone: scores of their tasks, and the KL to the base elsewhere.

    python benchmarks/existing_causal.py --recipe text3-smollm2 --run RUN --set data.root=DATA --set base.model=SMOLLM2 \
        --general GLUE/mrpc/train.parquet:sentence1 --out docs/results

RUN is what `plait run` made of the recipe; its adapters of one arm and seed are taken. Adds to --out/existing.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import existing_page
import numpy as np

from plait.adapters.peft_format import read_adapter
from plait.choosing.auto_settings import AutoSettings
from plait.choosing.candidates import METHODS, SCALES, Tried, merged_by, recipes
from plait.choosing.choose import choose
from plait.choosing.factors_only import choose_by_factors
from plait.evaluation.evaluate import scored_labels
from plait.evaluation.fleet import Candidate, predict_many
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.score import fidelities
from plait.fidelity.texts import read_place
from plait.learning.repair import repaired
from plait.recipes.recipe_file import find_recipe, read_recipe
from plait.runs.session import Session
from plait.tasks.metrics import primary, scores


def parsed() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", required=True, type=Path)
    p.add_argument("--run", required=True, type=Path)
    p.add_argument("--set", action="append", default=[])
    p.add_argument("--arm", default="gaussian")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--texts", type=int, default=100)
    p.add_argument("--general", required=True)
    p.add_argument("--rows", type=int, default=400, help="validation rows of each task")
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--methods", type=lambda t: tuple(t.split(",")), default=METHODS)
    p.add_argument("--scales", type=lambda t: tuple(map(float, t.split(","))), default=SCALES)
    p.add_argument("--out", required=True, type=Path)
    return p.parse_args()


def main() -> None:
    a = parsed()
    started = time.perf_counter()

    def tell(what: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {what}", flush=True)

    session = Session(read_recipe(find_recipe(a.recipe), a.set))
    names = list(session.tasks)
    adapters = [read_adapter(a.run / "adapters" / a.arm / f"seed-{a.seed}" / n, name=n) for n in names]
    texts = {n: session.training(n, a.seed).texts[: a.texts] for n in names}
    merges = dict.fromkeys(("base",), (None, 1.0))
    merges["without text"] = (choose_by_factors(adapters, a.methods, a.scales).adapter, 1.0)
    settings = AutoSettings(methods=a.methods, scales=a.scales, refine=a.steps)
    chosen = {}
    panels = {}
    for where in ("all", "end"):
        panels[where] = Panel(
            session.base, parts_of(adapters), texts, read_place(a.general, a.texts), 16, session.recipe.data.max_length, where
        )  # fmt: skip
        found = choose(panels[where], adapters, settings, on_progress=tell)
        merges[f"by fidelity at {where} positions"] = (found.adapter, 1.0)
        chosen[where] = {
            "candidate": found.recipe.label,
            "scale": found.scale,
            "learnt": bool(found.weights),
            "held_out": dict(found.held_out),
        }
        tell("repair")
        merges[f"by fidelity at {where} positions, repaired"] = (
            repaired(panels[where], found.adapter, a.steps)[0],
            1.0,
        )
    grid = [("task_arithmetic", s) for s in a.scales]
    plain = Tried(
        next(recipes((), ("task_arithmetic",))), merged_by(next(recipes((), ("task_arithmetic",))), adapters, {})
    )
    merges |= {f"task_arithmetic at {s:g}": (plain.adapter, s) for _, s in grid}
    tell(f"scores of {len(merges)} merges")
    rows = scored(session, names, adapters, list(merges.values()), a.rows)
    tell("fidelity of them")
    kls = {w: fidelities(p, list(merges.values())) for w, p in panels.items()}
    table = [
        {
            "name": name, "scores": rows[i],
            "general_kl": kls["all"][i].general_kl,
            "fidelity": {w: k[i].record() for w, k in kls.items()},
        }
        for i, name in enumerate(merges)
    ]  # fmt: skip
    alone = scored_alone(session, names, adapters, a.rows)
    table.insert(0, {"name": "each adapter on its own task", "scores": alone, "general_kl": None})
    file = a.out / "existing.json"
    report = json.loads(file.read_text()) if file.exists() else {}
    report["causal"] = {
        "text": (
            f"{session.base.name.rpartition('/')[2]}, {len(names)} adapters ({a.arm}, seed {a.seed}) that knew nothing of each other, "
            f"{a.texts} unlabelled prompts of each, scores on {a.rows} validation rows."
        ),
        "tasks": names, "rows": table, "chosen": chosen, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    file.write_text(json.dumps(report, indent=1) + "\n")
    if "seeds" in report:
        (a.out / "existing.md").write_text(existing_page.page(report))
    for row in table:
        print(row["name"], {k: round(v, 1) for k, v in row["scores"].items()}, row["general_kl"])
    print(f"{time.perf_counter() - started:.0f} s")


def scored(session: Session, names, adapters, merges, rows: int) -> list[dict[str, float]]:
    """Per merge, each task's score in percent."""
    found: list[dict[str, float]] = [{} for _ in merges]
    for n in names:
        task, examples = session.tasks[n], session.validation(n)
        chosen = np.arange(min(rows, len(examples)))
        labels = scored_labels(task, examples)[chosen]
        outputs = predict_many(session.evaluator, n, [Candidate({}, m, s) for m, s in merges], chosen)
        for one, logits in zip(found, outputs, strict=True):
            one[n] = primary(scores(task.metrics, logits, labels))
    return found


def scored_alone(session: Session, names, adapters, rows: int) -> dict[str, float]:
    """Each adapter on its own task."""
    return {n: scored(session, [n], adapters, [(a, 1.0)], rows)[0][n] for n, a in zip(names, adapters, strict=True)}


if __name__ == "__main__":
    main()
