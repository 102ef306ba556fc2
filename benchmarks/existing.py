"""Merging adapters that know nothing of each other, without labels: how much of what labels could reach is reached.

    python benchmarks/existing.py --base MODEL --data GLUE --adapters RUN/adapters/kaiming --out docs/results

`--adapters` holds seed-S/TASK folders as `plait run` writes them. For every seed: all candidates (methods x pico x scales)
are scored by fidelity on unlabelled training texts and by labels on validation rows; halves of the validation rows take
turns in choosing (by labels) and reporting. What a user gets is made by the functions that `plait merge` and `plait merge auto`
call: the default at the prompt, `merge auto` without texts, with --texts (chosen, weights learnt, fitted, heads that follow), and
repaired. `--joint` holds the same folders of one adapter that was trained on all tasks (an arm with `joint: true`), for
`recovered_joint`. A seed that --out/existing.json already holds is not done again. --out/existing-raw.json keeps every candidate's
fidelity to every adapter beside its true scores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import existing_page
import numpy as np
import torch
from fitted import steps_of
from intervals import t_interval
from judging import GLUE, Judge, task_of
from scipy.stats import spearmanr

from plait.adapters.lora import Adapter
from plait.adapters.peft_format import read_adapter
from plait.border.records import to_json
from plait.choosing.candidates import METHODS, SCALES, Tried, groups_of, merged_by, recipes
from plait.choosing.choose import scaled
from plait.choosing.factors_only import choose_by_factors
from plait.choosing.proxy import mean_error, terms_over
from plait.disk.store import versions
from plait.fidelity.measure import TaskFidelity, aggregate
from plait.fidelity.moments import collect_moments, merged_kinds
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.score import fidelities
from plait.learning.distil import distil
from plait.merging import merge
from plait.merging.registry import find_method
from plait.model.base import BaseModel
from plait.tasks import load_examples

# What `merge auto` makes of texts -> the step of `fitted.py` that makes it.
FROM_TEXTS = {
    "100 texts, chosen": "chosen",
    "100 texts, weights learnt": "weights learnt",
    "100 texts, fitted": "fitted",
    "100 texts": "fitted, heads",
    "100 texts, repaired": "fitted, repaired, heads",
}
# Key of the report -> row.
KEYS = {
    "default_at_prompt": "default at the prompt",
    "recovered_no_text": "no text",
    "recovered_100_texts": "100 texts",
    "recovered_repaired": "100 texts, repaired",
    "recovered_oracle": "chosen by labels",
    "recovered_joint": "joint training",
}


def _mean(values) -> float:
    return float(np.mean(values))


def _probability(one: TaskFidelity) -> float:
    """The probability beyond chance, also where the merge is surer than the adapter; `followed` counts no more than the adapter's own."""
    return replace(one, capped=None).followed


# Ways to put adapters' fidelities together, larger is better; "score" is the one that chooses.
AGGREGATES = {
    "score": aggregate,
    "mean of both beyond chance": lambda tasks: _mean([0.5 * (t.beyond_chance + _probability(t)) for t in tasks]),
    "mean agreement": lambda tasks: _mean([t.agreement for t in tasks]),
    "mean beyond chance": lambda tasks: _mean([t.beyond_chance for t in tasks]),
    "mean probability beyond chance": lambda tasks: _mean([_probability(t) for t in tasks]),
    "mean kept agreement": lambda tasks: _mean([t.kept_agreement for t in tasks]),
    "worst kept agreement": lambda tasks: min(t.kept_agreement for t in tasks),
    "mean kept (KL over the base's)": lambda tasks: _mean([t.kept for t in tasks]),
    "minus mean KL": lambda tasks: -_mean([t.kl for t in tasks]),
    "worst kept": lambda tasks: min(t.kept for t in tasks),
}


def one_seed(
    base: BaseModel, adapters: list[Adapter], joint: list[Adapter], tasks, validation, texts, a: argparse.Namespace
) -> dict[str, Any]:
    """Everything about the adapters of one seed, with one trained on all tasks beside them where there is one."""
    clock = {"start": time.perf_counter()}
    panel = Panel(base, parts_of(adapters), texts, max_length=a.length)
    grid, full = Judge(panel, tasks, validation, a.grid_rows), Judge(panel, tasks, validation, a.rows)
    moments = collect_moments(panel)
    tried = [Tried(r, merged_by(r, adapters, moments)) for r in recipes(merged_kinds(moments))]
    entries = [(t, s) for t in tried for s in a.scales]
    tick(clock, "merge")
    fidelity = fidelities(panel, [(t.adapter, s) for t, s in entries])
    tick(clock, "fidelity")
    by_label = grid.scores([(t.adapter, s) for t, s in entries])
    tick(clock, "grid")
    arms, facts = label_free(panel, adapters, a)
    tick(clock, "label_free")
    labelled = (
        [choice_by_labels(grid, adapters, entries, arms, by_label, half, a) for half in (0, 1)] if a.label_steps else []
    )
    tick(clock, "chosen by labels")
    if joint:
        arms["joint training"] = {p.name: (j, 1.0) for p, j in zip(panel.parts, joint, strict=True)}
    rows = reported(full, panel, arms, entries, by_label, labelled)
    tick(clock, "reported")
    truth = by_label.mean((1, 2))
    return {
        **rows,
        **facts,
        "raw": raw(panel.names, entries, fidelity, by_label),
        "by_aggregate": by_aggregate(entries, fidelity, truth),
        "by_assumption": by_assumption(adapters, entries, truth),
        "candidates": [
            {
                "candidate": t.recipe.label, "scale": s, "score": float(truth[i]),
                "fidelity": {k: f([*fidelity[i].tasks]) for k, f in AGGREGATES.items()},
            }
            for i, (t, s) in enumerate(entries)
        ],
        "seconds": {k: v for k, v in clock.items() if k not in ("start", "last")},
    }  # fmt: skip


def raw(names: Sequence[str], entries, fidelity, by_label) -> dict[str, Any]:
    """Every candidate's fidelity to every adapter, and its true scores: what any other measure can be tried on."""
    fields = (
        "kl",
        "agreement",
        "chance",
        "probability",
        "probability_chance",
        "capped",
        "kl_base",
        "agreement_base",
        "n",
    )
    found = [{t.task: t for t in f.tasks} for f in fidelity]
    return {
        "tasks": list(names),
        "candidates": [[t.recipe.label, s] for t, s in entries],
        "score_halves_tasks": by_label.round(3).tolist(),
        "fidelity": {n: {k: [round(getattr(f[n], k), 6) for f in found] for k in fields} for n in names},
    }


def by_aggregate(entries, fidelity, truth) -> dict[str, Any]:
    """What each way to put fidelities together would have chosen, and its mean score on the grid's rows."""
    found = {}
    for name, f in AGGREGATES.items():
        i = max(range(len(entries)), key=lambda i: f([*fidelity[i].tasks]))
        found[name] = {"candidate": entries[i][0].recipe.label, "scale": entries[i][1], "score": float(truth[i])}
    return found | {"labels": {"score": float(truth.max())}}


def by_assumption(adapters, entries, truth) -> dict[str, Any]:
    """What factors alone would choose under other assumed moments, and that choice's mean score on the grid's rows."""
    blind = [i for i, (t, _) in enumerate(entries) if not find_method(t.recipe.method).needs]
    shares = (0.0, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
    known: dict[int, Any] = {}
    errors = {s: [] for s in shares}
    for i in blind:
        tried, scale = entries[i]
        if id(tried) not in known:
            known[id(tried)] = terms_over(tried.adapter, adapters, shares)
        for s in shares:
            errors[s].append(mean_error(known[id(tried)][s], scale))
    found = {}
    for s in shares:
        i = blind[int(np.argmin(errors[s]))]
        rank = spearmanr([-e for e in errors[s]], truth[blind]).statistic
        found[f"{s:g}"] = {
            "candidate": entries[i][0].recipe.label,
            "scale": entries[i][1],
            "score": float(truth[i]),
            "rank": float(rank),
        }
    return found


def tick(clock: dict[str, float], name: str) -> None:
    """Seconds since the last call, under a name."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    now = time.perf_counter()
    clock[name] = now - clock.get("last", clock["start"])
    clock["last"] = now
    print(f"  {name} {clock[name]:.1f} s", flush=True)


def label_free(panel, adapters, a) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is made without labels: at the prompt, from factors alone, and from the texts step by step."""
    blind = choose_by_factors(adapters, METHODS, a.scales)
    steps, facts, _ = steps_of(panel, adapters, steps=a.steps)
    arms = {"default at the prompt": (merge(adapters, verify=False).adapter, 1.0), "no text": (blind.adapter, 1.0)}
    for name, step in FROM_TEXTS.items():
        arms[name] = (steps[step], 1.0)
    label, scale = facts.pop("chosen")
    facts["step_seconds"] = facts.pop("seconds")
    facts["chosen_no_text"] = to_json(blind.chosen)
    facts["chosen_100_texts"] = {"candidate": label, "scale": scale, "held_out": facts.pop("held_out")}
    return arms, facts


def choice_by_labels(grid: Judge, adapters, entries, arms, by_label, half: int, a) -> list[tuple[str, Any]]:
    """Merges that labels of one half lead to: the best candidate, weights learnt on the labels, or what was made without them.

    One weight per adapter and module, learnt from the best candidates of two methods that keep the adapters' ranks apart.
    """
    means = by_label[:, half].mean(1)
    order = np.argsort(-means)
    best = entries[order[0]]
    found = [(f"grid: {best[0].recipe.label} at {best[1]:g}", (best[0].adapter, best[1]))]
    apart = [entries[i] for i in order if len(next(iter(groups_of(entries[i][0], adapters).values()))) > 1]
    panel, loss = grid.labelled_loss(half, a.label_rows)
    starts = {
        id(e[0]): e for e in (best, apart[0], next(e for e in apart if e[0].recipe.method != apart[0][0].recipe.method))
    }
    for tried, scale in starts.values():
        done = distil(
            panel, scaled(tried.adapter, scale), learns="weights", groups=groups_of(tried, adapters),
            steps=a.label_steps, loss=loss,
        )  # fmt: skip
        found.append((f"weights learnt from {tried.recipe.label} at {scale:g}", (done.adapter, 1.0)))
    found += arms.items()
    scored = grid.scores([w for _, w in found])[:, half].mean(1)
    return [found[int(np.argmax(scored))]]


def reported(full: Judge, panel: Panel, arms, entries, by_label, labelled) -> dict[str, Any]:
    """Scores on the half that did not choose, halves swapped and averaged; and recovered shares."""
    labels = sorted({t.recipe.label for t, _ in entries})
    picks = []
    for half in (0, 1):
        means = by_label[:, half].mean(1)
        picks.append(
            {
                m: max((i for i, (t, _) in enumerate(entries) if t.recipe.label == m), key=lambda i: means[i])
                for m in labels
            }
        )
    indices = sorted({i for p in picks for i in p.values()})
    alone = {p.name: (p.adapter, 1.0) for p in panel.parts}
    worn = [
        alone,
        (None, 1.0),
        *arms.values(),
        *(o[0][1] for o in labelled),
        *((entries[i][0].adapter, entries[i][1]) for i in indices),
    ]
    found = full.scores(worn)
    top, floor = found[0].mean(0), found[1].mean(0)
    n = len(arms)
    rows = {name: found[2 + i].mean(0) for i, name in enumerate(arms)}
    if labelled:
        rows["chosen by labels"] = (found[2 + n][1] + found[3 + n][0]) / 2
    for m in labels:
        at = [2 + n + len(labelled) + indices.index(picks[h][m]) for h in (0, 1)]
        rows[f"{m}, best scale by labels"] = (found[at[0]][1] + found[at[1]][0]) / 2
    names = [p.name for p in panel.parts]

    def row(values: np.ndarray) -> dict[str, Any]:
        share = (values.mean() - floor.mean()) / (top.mean() - floor.mean())
        return {
            "mean": float(values.mean()),
            "recovered": float(share),
            "tasks": dict(zip(names, map(float, values), strict=True)),
        }

    scales = {m: [entries[picks[h][m]][1] for h in (0, 1)] for m in labels}
    return {
        "alone": row(top), "floor": row(floor), "rows": {k: row(v) for k, v in rows.items()},
        "label_scales": scales, "chosen_by_labels": [o[0][0] for o in labelled],
    }  # fmt: skip


# How fidelities are put together where `merge auto` chooses.
CHOOSES = "mean probability beyond chance"


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """The figures over all seeds."""

    def mean(values) -> float:
        return float(np.mean(list(values)))

    names = [n for n in next(iter(seeds.values()))["rows"] if all(n in s["rows"] for s in seeds.values())]
    recovered = {n: mean(s["rows"][n]["recovered"] for s in seeds.values()) for n in names}
    ranks = {}
    recorded = set.intersection(*(set(s["candidates"][0]["fidelity"]) for s in seeds.values()))
    for kind in (k for k in AGGREGATES if k in recorded):
        each = [
            spearmanr([c["fidelity"][kind] for c in s["candidates"]], [c["score"] for c in s["candidates"]]).statistic
            for s in seeds.values()
        ]
        ranks[kind] = mean(each)
    each = {k: [s["rows"][row]["recovered"] for s in seeds.values()] for k, row in KEYS.items() if row in names}
    figures: dict[str, Any] = {k: mean(each[k]) if k in each else None for k in KEYS}
    labelled = figures["recovered_oracle"]
    return {
        **figures,
        "share_of_oracle": figures["recovered_100_texts"] / labelled if labelled else None,
        "rank_correlation": ranks.get(CHOOSES, ranks["score"]),
        "intervals": {k: interval(v) for k, v in each.items()},
        "rank_correlations": ranks,
        "recovered": recovered,
    }


def interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % t interval of a mean over seeds; None of one seed."""
    if len(values) < 2:
        return None
    found = t_interval(values)
    return [found.low, found.high]


def parsed() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True)
    p.add_argument("--data", required=True, type=Path, help="rows, laid out as TASK/train.parquet")
    p.add_argument("--adapters", required=True, type=Path, help="folder of seed-S/TASK")
    p.add_argument("--joint", type=Path, help="the same of one adapter that was trained on all tasks")
    p.add_argument("--tasks", default=GLUE)
    p.add_argument("--seeds", default="", help="0,1,2; all there are by default")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--texts", type=int, default=100)
    p.add_argument(
        "--grid-rows", type=int, default=250, help="validation rows of each half and task that all candidates see"
    )
    p.add_argument(
        "--rows", type=int, default=0, help="rows of each half that the chosen ones are reported on; 0 for all"
    )
    p.add_argument("--label-rows", type=int, default=500)
    p.add_argument("--steps", type=int, default=100, help="of learning weights and of repairing, without labels")
    p.add_argument(
        "--label-steps", type=int, default=100, help="of learning weights from labels; 0: labels only choose scales"
    )
    p.add_argument("--note", default="", help="a paragraph for the page")
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--scales", type=lambda t: tuple(map(float, t.split(","))), default=SCALES)
    return p.parse_args()


def main() -> None:
    a = parsed()
    started = time.perf_counter()
    base = BaseModel(a.base, dtype=a.dtype, device=a.device)
    names, root = a.tasks.split(","), a.data.absolute()
    tasks = {n: task_of(n, root) for n in names}
    validation = {n: load_examples(tasks[n], "validation", root=root) for n in names}
    found = [f"seed-{s}" for s in a.seeds.split(",") if s] or sorted(f.name for f in a.adapters.glob("seed-*"))
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out / "existing.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    settings = {
        k: str(v) if isinstance(v, Path) else v
        for k, v in vars(a).items()
        if k
        in ("tasks", "texts", "grid_rows", "rows", "label_rows", "label_steps", "steps", "length", "scales", "dtype")
    }
    settings |= {"base": Path(a.base).name, "scales": list(a.scales), "arm": a.adapters.name}
    if {"arm": settings["arm"], **known.get("settings", settings)} != settings:
        raise SystemExit(f"{file} holds results of other settings; choose another --out")
    seeds = known.get("seeds", {})
    for seed in found:
        if seed in seeds:
            continue
        print(seed, flush=True)
        adapters = [read_adapter(a.adapters / seed / n, name=n) for n in names]
        draw = int(seed.rpartition("-")[2])
        texts = {n: load_examples(tasks[n], "train", root=root, rows=a.texts, seed=1000 + draw).texts for n in names}
        joint = [read_adapter(a.joint / seed / n, name=n) for n in names] if a.joint else []
        seeds[seed] = one_seed(base, adapters, joint, tasks, validation, texts, a)
        device = torch.cuda.get_device_name() if base.torch_device.type == "cuda" else "CPU"
        everything = a.out / "existing-raw.json"
        kept = json.loads(everything.read_text()) if everything.exists() else {}
        everything.write_text(json.dumps(kept | {seed: seeds[seed].pop("raw")}) + "\n")
        report = {
            **known,
            **summary(seeds),
            "note": a.note,
            "settings": settings,
            "device": device,
            "versions": versions(),
            "seeds": seeds,
        }
        file.write_text(json.dumps(report, indent=1) + "\n")
        (a.out / "existing.md").write_text(existing_page.page(report))
    print(
        json.dumps(
            {
                k: v
                for k, v in json.loads(file.read_text()).items()
                if k in KEYS or k in ("share_of_oracle", "rank_correlation")
            }
        )
    )
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
