r"""Rounds of train and merge, and moments taken with the adapter on and exchanged halfway, at equal steps.

    PYTHONPATH=src:benchmarks python -P benchmarks/rounds.py --study recipes/studies/arms-mpnet.yaml --set base.model=MPNET \
        --set data.root=GLUE --out RUN --to docs/results

Takes base, tasks, rows, rank, rate, steps and seeds from a study. `kaiming` and `penalised` (contrastive start, beta 1) train once.
`rounds` and `rounds_penalised` train a quarter of the steps, add the merge by task arithmetic at the rule's scale to the base, and go on
from there with new factors, four times; what is scored is the sum of the merges, at scale 1. `refreshed` trains half of the steps, takes
every task's moments with its adapter on, and trains on with these in the penalty; `restarted` is interrupted alike and keeps the old
ones. Every part begins with a new AdamW and goes on in the one schedule. No label has a say in a merge. What lies in RUN/records is
not made again; `--page-only` makes nothing at all. Writes rounds.json and rounds.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_finetuning import joined, kept, trained
from intervals import t_interval

from plait.adapters.lora import Adapter, LoraFactors
from plait.evaluation.protocol import Scorer
from plait.evaluation.splits import HALVES, split_rows
from plait.merging import merge
from plait.merging.scales import scale_by_rule
from plait.model.applied import applied
from plait.recipes.recipe_file import read_recipe
from plait.runs.session import Session
from plait.statistics import Statistics, collect_statistics
from plait.subspaces.start import InitialSettings, initial_adapters
from plait.tasks import batches
from plait.tasks.encoding import encode
from plait.training import TrainingSettings
from plait.training.peft_model import TASK_TYPES


@dataclass(frozen=True, slots=True)
class Way:
    """How an arm is trained.

    Args:
        subspace: Where A starts.
        penalised: Whether the others' outputs are held in place.
        parts: Parts of equal length.
        merges: Whether what is trained is merged into the base after each part.
        refreshes: Whether moments are taken anew between parts.
    """

    subspace: str
    penalised: bool
    parts: int = 1
    merges: bool = False
    refreshes: bool = False


ARMS: Mapping[str, Way] = {
    "kaiming": Way("kaiming", False),
    "rounds": Way("kaiming", False, 4, merges=True),
    "penalised": Way("contrastive", True),
    "rounds_penalised": Way("contrastive", True, 4, merges=True),
    "restarted": Way("contrastive", True, 2),
    "refreshed": Way("contrastive", True, 2, refreshes=True),
}

# What is changed, beside what it is changed from.
PAIRS = (
    ("rounds", "kaiming"),
    ("rounds", "penalised"),
    ("penalised", "kaiming"),
    ("rounds_penalised", "penalised"),
    ("refreshed", "restarted"),
)


def moments(session: Session, seed: int, adapters: Mapping[str, Adapter] | None = None) -> dict[str, Statistics]:
    """Every task's moments, of the bare base or with its own adapter on."""
    collected = {}
    for name, task in session.tasks.items():
        model, tokenizer = session.evaluator.task_model(name), session.evaluator.tokenizer
        rows = encode(tokenizer, task, session.sample(name, seed), session.recipe.data.max_length)
        given = batches(tokenizer, rows, session.recipe.statistics.batch_size, by_length=True)
        with applied(model, adapters[name] if adapters else None):
            collected[name] = collect_statistics(
                model, given, session.recipe.lora.target_modules, provenance={"task": name}
            )
    return collected


def added(first: Adapter | None, second: Adapter, scale: float = 1.0) -> Adapter:
    """The sum of two updates of the same modules, the second times a number."""
    modules = {}
    for name, f in second.modules.items():
        A, B = f.A, f.B * (f.scaling * scale)
        if first is not None:
            one = first.modules[name]
            A, B = torch.cat([one.A, A]), torch.cat([one.B * one.scaling, B], 1)
        modules[name] = LoraFactors(A, B, 1.0, f.kind)
    return replace(second, modules=modules)


def by_rule(adapters: Mapping[str, Adapter], device: Any) -> tuple[Adapter, float]:
    """Task arithmetic at scale 1, and the scale that the rule says for so many."""
    made = merge(list(adapters.values()), "task_arithmetic", scale=1.0, device=str(device), verify=False).adapter
    return made, scale_by_rule("task_arithmetic", None, (1.0,) * len(adapters)).value


def run_arm(session: Session, way: Way, seed: int) -> tuple[dict[str, Adapter], Adapter]:
    """Train an arm: each task's adapter as it stands at the end, and the merge."""
    recipe, device = session.recipe, session.base.torch_device
    constraint: dict[str, Any] = {"constraint": "penalised"} if way.penalised else {}
    settings = TrainingSettings(**{**recipe.training, **constraint, "max_length": recipe.data.max_length})
    statistics = moments(session, seed)
    kind = next(iter(session.tasks.values())).kind
    begun = InitialSettings(way.subspace, recipe.lora.rank, recipe.lora.alpha, task_type=TASK_TYPES[kind])
    first = {
        t: a
        for t, (a, _) in initial_adapters(statistics, begun, base=recipe.base.model, seed=seed, device=device).items()
    }
    adapters, carried, before = dict(first), None, None
    for part in range(way.parts):
        adapters = {
            t: trained(session, t, a, settings, statistics, seed, False, part=(part, way.parts), carried=carried)
            for t, a in adapters.items()
        }
        if way.merges:
            before, (made, scale) = carried, by_rule(adapters, device)
            carried = added(carried, made, scale)
        last = part == way.parts - 1
        if way.merges and not last:  # new factors, the heads as they are
            adapters = {t: replace(first[t], heads=a.heads) for t, a in adapters.items()}
        if way.refreshes and not last:
            statistics = moments(session, seed, adapters)
    if carried is not None:
        return {t: replace(added(before, a), heads=a.heads) for t, a in adapters.items()}, carried
    made, scale = by_rule(adapters, device)
    return adapters, added(None, made, scale)


def record_of(session: Session, arm: str, seed: int) -> dict[str, Any]:
    """Train, merge, score on both halves."""
    started = time.time()
    adapters, merged = run_arm(session, ARMS[arm], seed)
    recipe = session.recipe
    options = {"seed": recipe.evaluation.split_seed, "tuning_rows": recipe.tuning_rows, "grid_rows": recipe.grid_rows}
    splits = {t: split_rows(len(session.validation(t)), **options) for t in session.tasks}
    scorer = Scorer(session.evaluator, splits, {t: a.heads.get(t, {}) for t, a in adapters.items()})
    kinds = ("alone", "merged", "floor")
    scores: dict[str, dict[str, float]] = {k: {} for k in kinds}
    for task, split in splits.items():
        worn = [(adapters[task], 1.0), (merged, 1.0), (None, 0.0)]
        halves = [
            [scorer.score(task, x, split.halves[h]) for x in scorer.answers(task, worn, split.halves[h])]
            for h in HALVES
        ]
        for k, value in zip(kinds, np.mean(halves, 0).tolist(), strict=True):
            scores[k][task] = round(value, 3)
    print(f"{arm}, seed {seed}: {time.time() - started:.0f} s", flush=True)
    return {"arm": arm, "seed": seed, **scores, "seconds": round(time.time() - started, 1)}


def page(records: Sequence[Mapping[str, Any]], about: str) -> str:
    """A line for each arm: means over tasks and seeds, and what has no line."""
    lines = ["# Rounds, and moments refreshed halfway", "", about, ""]
    lines += ["| arm | seeds | alone | merged | floor | of own gain, % |", "|---" * 6 + "|"]
    for arm in dict.fromkeys(r["arm"] for r in records):
        group = [r for r in records if r["arm"] == arm]
        alone, merged, floor = (
            float(np.mean([list(r[k].values()) for r in group])) for k in ("alone", "merged", "floor")
        )
        share = 100 * (merged - floor) / (alone - floor) if alone != floor else float("nan")
        lines.append(f"| `{arm}` | {len(group)} | {alone:.1f} | {merged:.1f} | {floor:.1f} | {share:.0f} |")
    if missing := [f"`{arm}`" for arm in ARMS if arm not in {r["arm"] for r in records}]:
        lines += ["", f"Not run: {', '.join(missing)}."]
    return "\n".join([*lines, *_differences(records)]) + "\n"


def _differences(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a change of the training adds to the merged scores: t over tasks, each the mean over the seeds that both arms have."""
    lines = []
    for arm, against in PAIRS:
        merged = {(r["arm"], r["seed"]): r["merged"] for r in records}
        seeds = [s for a, s in merged if a == arm and (against, s) in merged]
        tasks = merged[arm, seeds[0]] if seeds else ()
        off = [np.mean([merged[arm, s][t] - merged[against, s][t] for s in seeds]) for t in tasks]
        if len(off) > 1:
            d = t_interval(off)
            lines.append(
                f"| `{arm}` - `{against}` | {len(seeds)} | {d.mean:+.1f} | {d.low:+.1f} to {d.high:+.1f} | {d.p:.3f} |"
            )
    head = ["", "| merged, points | seeds | difference | 95 % (t over tasks) | p |", "|---" * 5 + "|"]
    return [*head, *lines] if lines else []


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", required=True, type=Path)
    p.add_argument("--set", action="append", default=[], help="KEY=VALUE of the study")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--arms", default=",".join(ARMS))
    p.add_argument("--to", type=Path, help="where the page goes; by default nowhere")
    p.add_argument("--page-only", action="store_true", help="make nothing: the page of what RUN/records holds")
    a = p.parse_args(arguments)
    recipe = read_recipe(a.study, a.set)
    session = Session(recipe)
    places = [
        (a.out / "records" / f"{arm}-{seed}.json", partial(record_of, session, arm, seed))
        for seed in recipe.seeds
        for arm in a.arms.split(",")
    ]
    records = [kept(place, make) for place, make in places if place.exists() or not a.page_only]
    records = joined(records, a.to / "rounds.json" if a.to else None, ("arm", "seed"))
    seeds = ", ".join(str(s) for s in sorted({r["seed"] for r in records}))
    about = (
        f"{Path(recipe.base.model).name}, {len(recipe.task_names)} tasks, {recipe.training.get('steps')} steps in all, seeds "
        f"{seeds}; merged by task arithmetic at the rule's scale, so no label has a say. `kaiming` is PEFT's default start, `penalised` "
        "starts at `contrastive` and holds the others' outputs in place; `rounds` is `kaiming` in four parts of a quarter of the steps, "
        "after each of which all tasks' factors are merged into the base, `rounds_penalised` is `penalised` so. `restarted` is `penalised` "
        "with a new AdamW after half of the steps; `refreshed` also takes all moments anew there, with each task's adapter on. "
        "*Alone*: each task's own adapter, of `rounds` on the base that holds the first three merges. *Floor*: the bare base with the "
        "heads as trained.\n\n"
        "    PYTHONPATH=src:benchmarks python -P benchmarks/rounds.py --study STUDY --set base.model=BASE --set data.root=DATA "
        "--out RUN --to docs/results"
    )
    if a.to:
        (a.to / "rounds.json").write_text(json.dumps({"about": about, "rows": records}, indent=1) + "\n")
        (a.to / "rounds.md").write_text(page(records, about))
    print(page(records, about))


if __name__ == "__main__":
    main()
