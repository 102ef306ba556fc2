"""What fitting a chosen merge front to back adds, and heads that follow it, step by step; without labels.

    python benchmarks/fitted.py --base MODEL --data GLUE --adapters RUN/adapters/kaiming --seeds 8,9 --out docs/results [--labels 300]

`--adapters` holds seed-S/TASK folders as `plait run` writes them. Everything is chosen on --texts training texts of each task without
their labels; the shares of what the adapters gain are of validation rows that nothing else reads. `--labels N` scores all that the choice
looked at by the labels of N rows of each half of each validation set: how fidelity ranks it, and what labels would have chosen.
A seed that --out/NAME.json already holds is not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from intervals import t_interval
from judging import GLUE, Judge, task_of
from scipy.stats import spearmanr

from plait.adapters.lora import Adapter, truncated
from plait.adapters.peft_format import read_adapter
from plait.border.records import to_json
from plait.choosing.auto_settings import AutoSettings
from plait.choosing.choose import Choice, choose, refined_weights
from plait.choosing.finishing import judged_with_heads
from plait.disk.store import versions
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.score import fidelities
from plait.learning.fitting import SCALES, TRIED, Fit, best_fit, fitted
from plait.learning.heads import refit_heads
from plait.learning.repair import repaired
from plait.merging import merge
from plait.model.base import BaseModel
from plait.tasks import load_examples

STEPS = (
    ("no text", "TSV-M at its default scale"),
    ("chosen", "`merge auto --refine 0 --no-fit --no-heads`"),
    ("weights learnt", "`merge auto --no-fit --no-heads`"),
    ("fitted", "`merge auto --no-heads`"),
    ("fitted, heads", "`merge auto`"),
    ("chosen, heads", "`merge auto --refine 0 --no-fit`"),
    ("repaired", "`merge auto --no-fit --no-heads --repair 100`"),
    ("fitted, repaired", "`merge auto --no-heads --repair 100`"),
    ("fitted, repaired, heads", "`merge auto --repair 100`"),
    (
        "fitted at the adapters' rank",
        "`merge auto --no-heads --rank R` (cut in the metric of the inputs, layer by layer)",
    ),
    ("fitted, cut to the adapters' rank", "the same, cut afterwards by its weights"),
)


class Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[[], Any]) -> Any:
        """Call it, and note how long that took."""
        started = time.perf_counter()
        result = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = round(time.perf_counter() - started, 2)
        print(f"  {name} {self.seconds[name]:.1f} s", flush=True)
        return result


def steps_of(
    panel: Panel, adapters: list[Adapter], steps: int = 100
) -> tuple[dict[str, Adapter], dict[str, Any], list[tuple[str, Adapter, float]]]:
    """Make every step's merge; what was chosen on the way; and all that was looked at.

    Weights are learnt in so many steps, and repairs take as many at most.
    """
    clock = Clock()
    arms = {"no text": merge(adapters, "tsv", verify=False).adapter}
    choice = clock.timed("chosen", lambda: choose(panel, adapters, AutoSettings(refine=0, fit=False)))
    plain = learnt = best = choice.adapter
    refined, _, held = clock.timed(
        "weights learnt", lambda: refined_weights(panel, adapters, choice.scored[0], steps, 0)
    )
    fit, held["fitted"] = clock.timed("fits tried", lambda: best_fit(panel, adapters, plain))
    if held["refined"] > held["chosen"]:
        learnt = best = refined
    if kept := held["fitted"] > max(held["refined"], held["chosen"]):
        best = clock.timed("fitted", lambda: fitted(panel, adapters, plain, fit))
    arms |= {"chosen": plain, "weights learnt": learnt, "fitted": best}
    arms["repaired"], _ = clock.timed("repaired", lambda: repaired(panel, learnt, steps))
    arms["fitted, repaired"], repair = clock.timed("fitted, repaired", lambda: repaired(panel, best, steps))
    starts = {n: arms[n] for n in ("chosen", "fitted", "fitted, repaired")}
    if repair.kept:
        repair = clock.timed(
            "judged with heads", lambda: judged_with_heads(panel, best, starts["fitted, repaired"], repair)
        )
        starts["fitted, repaired"] = starts["fitted, repaired"] if repair.kept else best
    refits = {}
    for name, start in starts.items():
        arms[f"{name}, heads"], refits[name] = clock.timed(f"{name}, heads", lambda m=start: refit_heads(panel, m))
    rank = max(a.rank for a in adapters)
    if kept:
        arms["fitted at the adapters' rank"] = clock.timed(
            "fitted at the adapters' rank", lambda: fitted(panel, adapters, plain, fit, rank=rank)
        )
    shorter = {m: truncated(f, rank)[0] for m, f in best.modules.items()}
    arms["fitted, cut to the adapters' rank"] = replace(best, modules=shorter)
    facts = {
        "chosen": [choice.recipe.label, choice.scale],
        "fit": asdict(fit) if kept else None,
        "held_out": held,
        "repair": to_json(repair),
        "heads": {name: [to_json(r) for r in rows] for name, rows in refits.items()},
        "fidelity": dict(
            zip(arms, (f.score for f in fidelities(panel, [(a, 1.0) for a in arms.values()])), strict=True)
        ),
        "seconds": clock.seconds,
    }
    return arms, facts, looked_at(panel, adapters, choice, refined)


def looked_at(
    panel: Panel, adapters: list[Adapter], choice: Choice, refined: Adapter
) -> list[tuple[str, Adapter, float]]:
    """What a choice is made from, by name, with its scale: merges, the weights learnt, and every fit, to all texts."""
    candidates = [(s.tried.recipe.label, s.tried.adapter, s.scale) for s in choice.scored]
    candidates.append(("weights learnt", refined, 1.0))
    for pull, power in TRIED:
        fit = Fit(pull, float(f"{len(adapters) ** power:.3g}"), 1.0)
        whole = fitted(panel, adapters, choice.adapter, fit)
        candidates += [(f"fitted, pull {pull:g}", whole, scale) for scale in SCALES]
    return candidates


def by_labels(
    judge: Judge, panel: Panel, candidates: Sequence[tuple[str, Adapter, float]], chosen: Adapter
) -> dict[str, Any]:
    """How fidelity ranks what was looked at, and what labels of one half would have chosen, scored on the other.

    Args:
        judge: Scores by labels.
        panel: What fidelity is taken on.
        candidates: From `looked_at`.
        chosen: What was chosen without labels; the adapters' own heads answer.
    """
    worn = [(adapter, scale) for _, adapter, scale in candidates]
    alone = {p.name: (p.adapter, 1.0) for p in judge.panel.parts}
    means = judge.scores([alone, (None, 1.0), (replace(chosen, heads={}), 1.0), *worn]).mean(2)  # (merges, halves)
    top, floor, ours, table = means[0], means[1], means[2], means[3:]
    best = [int(np.argmax(table[:, half])) for half in (0, 1)]
    oracle = np.mean([(table[best[h], 1 - h] - floor[1 - h]) / (top[1 - h] - floor[1 - h]) for h in (0, 1)])
    choice = np.mean((ours - floor) / (top - floor))
    fidelity = [f.score for f in fidelities(panel, worn)]
    return {
        "rank_correlation": float(spearmanr(fidelity, table.mean(1)).statistic),
        "oracle": float(oracle), "choice": float(choice), "share_of_oracle": float(choice / oracle),
        "chosen_by_labels": [[candidates[i][0], round(candidates[i][2], 4)] for i in best],
        "candidates": [
            [name, round(scale, 4), round(f, 4), *t.round(2).tolist()]
            for (name, _, scale), f, t in zip(candidates, fidelity, table, strict=True)
        ],
    }  # fmt: skip


def judged(judge: Judge, arms: Mapping[str, Adapter]) -> dict[str, Any]:
    """Recovered shares and scores by task, on validation rows; every merge with its own heads."""
    alone = {p.name: (p.adapter, 1.0) for p in judge.panel.parts}
    scores = judge.scores([alone, (None, 1.0), *((a, 1.0) for a in arms.values())]).mean(1)
    top, floor = scores[0].mean(), scores[1].mean()
    names = [p.name for p in judge.panel.parts]
    rows = {
        name: {
            "recovered": float((scores[i].mean() - floor) / (top - floor)),
            "tasks": dict(zip(names, scores[i].round(2).tolist(), strict=True)),
        }
        for i, name in enumerate(arms, 2)
    }
    return {"alone": float(top), "floor": float(floor), "rows": rows}


ADDED = (
    ("texts choose (TSV-M at its default scale before)", "no text", "chosen"),
    ("weights learnt", "chosen", "weights learnt"),
    ("a fit", "chosen", "fitted"),
    ("a fit instead of weights", "weights learnt", "fitted"),
    ("heads refit, of what was chosen", "chosen", "chosen, heads"),
    ("heads refit, after a fit", "fitted", "fitted, heads"),
    ("heads refit, after fit and repair", "fitted, repaired", "fitted, repaired, heads"),
    ("repair, after weights", "weights learnt", "repaired"),
    ("repair, after a fit", "fitted", "fitted, repaired"),
    (
        "cut to the adapters' rank while fitting, not afterwards",
        "fitted, cut to the adapters' rank",
        "fitted at the adapters' rank",
    ),
    ("everything but repair, from TSV-M at its default scale", "no text", "fitted, heads"),
)


def added(seeds: Mapping[str, Any]) -> list[str]:
    """What each step adds, with the 95 % t interval over seeds, and its seconds."""
    lines = [
        "## What each step adds, with its interval",
        "",
        f"Differences of recovered, means over {len(seeds)} seeds with the 95 % t interval over them ({len(seeds) - 1} degrees of freedom: "
        f"wide). A repair was kept after the weights on {_repairs(seeds, 'weights learnt', 'repaired')} seeds, after the fit on "
        f"{_repairs(seeds, 'fitted', 'fitted, repaired')}.",
        "",
        "| step | added | 95 % interval | seconds |",
        "|---|---|---|---|",
    ]
    for name, before, after in ADDED:
        if all(before in s["rows"] and after in s["rows"] for s in seeds.values()):
            off = t_interval([s["rows"][after]["recovered"] - s["rows"][before]["recovered"] for s in seeds.values()])
            seconds = [s["seconds"].get(after) for s in seeds.values()]
            cost = f"{np.mean(seconds):.0f}" if None not in seconds and before != "no text" else ""
            lines.append(f"| {name} | {off.mean:+.3f} | {off.low:+.3f} to {off.high:+.3f} | {cost} |")
    return [*lines, ""]


def _repairs(seeds: Mapping[str, Any], before: str, after: str) -> str:
    changed = sum(s["rows"][before] != s["rows"][after] for s in seeds.values())
    return f"{changed} of {len(seeds)}"


def page(report: Mapping[str, Any]) -> str:
    """Tell the steps, each with what it adds."""
    seeds = report["seeds"]
    lines = [
        "# A merge fitted front to back, and heads that follow it",
        "",
        *report["about"],
        "",
        f"`python benchmarks/fitted.py` ({report['device']}, torch {report['versions']['torch']}); shares of what each task's own "
        f"adapter gains over the floor, of means over tasks, on up to {report['settings']['rows']} rows of each half of the validation "
        f"sets. Nothing was chosen on these seeds, and no label is read by any step ({report['settings']['texts']} texts of each task).",
        "",
        "| step | command | " + " | ".join(f"seed {s}" for s in seeds) + " | mean | seconds |",
        "|---|---|" + "---|" * (len(seeds) + 2),
    ]
    for name, command in STEPS:
        shares = [s["rows"][name]["recovered"] for s in seeds.values() if name in s["rows"]]
        if len(shares) == len(seeds):
            seconds = np.mean([s["seconds"].get(name, float("nan")) for s in seeds.values()])
            cells = " | ".join(f"{v:.3f}" for v in shares)
            lines.append(
                f"| {name} | {command} | {cells} | **{np.mean(shares):.3f}** | {'' if np.isnan(seconds) else f'{seconds:.0f}'} |"
            )
    lines += [
        "",
        "| seed | chosen | fit (pull, reach, scale) | held out: chosen, refined, fitted |",
        "|---|---|---|---|",
    ]
    for seed, s in seeds.items():
        fit = ", ".join(f"{v:g}" for v in (s["fit"] or {}).values()) or "not kept"
        held = ", ".join(f"{s['held_out'][k]:.3f}" for k in ("chosen", "refined", "fitted"))
        lines.append(f"| {seed} | {s['chosen'][0]} at {s['chosen'][1]:.3g} | {fit} | {held} |")
    lines += ["", *(added(seeds) if len(seeds) > 1 else ()), *labels_say(seeds), *report["after"], ""]
    return "\n".join(lines)


def labels_say(seeds: Mapping[str, Any]) -> list[str]:
    """How what was looked at ranks by fidelity and by labels, where that was measured."""
    seeds = {s: r["labels"] for s, r in seeds.items() if "labels" in r}
    if not seeds:
        return []
    lines = [
        "## What labels would have chosen",
        "",
        "Every merge at every scale that it was tried at, the weights learnt and every fit at every scale, scored by labels; with "
        "the adapters' own heads. *By labels*: the best on one half of the validation rows, reported on the other, halves swapped "
        "and averaged.",
        "",
        "| seed | candidates | rank correlation of fidelity with the true score | recovered, by labels | without labels | share | "
        "labels choose |",
        "|---" * 7 + "|",
    ]
    for seed, r in seeds.items():
        best = "; ".join(f"{name} at {scale:.3g}" for name, scale in r["chosen_by_labels"])
        lines.append(
            f"| {seed} | {len(r['candidates'])} | {r['rank_correlation']:.3f} | {r['oracle']:.3f} | {r['choice']:.3f} | "
            f"{r['share_of_oracle']:.3f} | {best} |"
        )
    mean = {
        k: np.mean([r[k] for r in seeds.values()]) for k in ("rank_correlation", "oracle", "choice", "share_of_oracle")
    }
    cells = " | ".join(f"**{v:.3f}**" for v in mean.values())
    return [*lines, f"| mean | | {cells} | |", ""]


def parsed() -> argparse.Namespace:
    """The arguments."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "data", "adapters", "out", "seeds"):
        p.add_argument(f"--{name}", required=True)
    p.add_argument("--tasks", default=GLUE)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="auto")
    p.add_argument("--texts", type=int, default=100)
    p.add_argument("--rows", type=int, default=1000)
    p.add_argument("--labels", type=int, default=0, help="rows of each half by which all that was looked at is scored")
    p.add_argument("--name", default="existing-fitted", help="of the files that are written")
    return p.parse_args()


def measured(base: BaseModel, a: argparse.Namespace, seed: str, tasks: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Everything about one seed."""
    root = Path(a.data).absolute()
    adapters = [read_adapter(Path(a.adapters) / f"seed-{seed}" / n, name=n) for n in names]
    texts = {n: load_examples(tasks[n], "train", root=root, rows=a.texts, seed=1000 + int(seed)).texts for n in names}
    validation = {n: load_examples(tasks[n], "validation", root=root) for n in names}
    panel = Panel(base, parts_of(adapters), texts)
    arms, facts, candidates = steps_of(panel, adapters)
    found = {**judged(Judge(panel, tasks, validation, a.rows), arms), **facts}
    if a.labels:
        found["labels"] = by_labels(Judge(panel, tasks, validation, a.labels), panel, candidates, arms["fitted"])
    return found


def main() -> None:
    """Measure the seeds that are missing, and write the page."""
    a = parsed()
    base, names = BaseModel(a.base, dtype=a.dtype, device=a.device), a.tasks.split(",")
    tasks = {n: task_of(n, Path(a.data).absolute()) for n in names}
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{a.name}.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"about": [], "after": [], "seeds": {}}
    settings = {"tasks": a.tasks, "texts": a.texts, "rows": a.rows, "dtype": a.dtype, "base": Path(a.base).name}
    if report.get("settings", settings) != settings:
        raise SystemExit(f"{file} holds results of other settings; choose another --out")
    for seed in a.seeds.split(","):
        if seed not in report["seeds"]:
            print(f"seed {seed}", flush=True)
            report["seeds"][seed] = measured(base, a, seed, tasks, names)
            device = torch.cuda.get_device_name() if base.torch_device.type == "cuda" else "CPU"
            report |= {"settings": settings, "device": device, "versions": versions()}
            file.write_text(json.dumps(report, indent=1) + "\n")
    text = page(report)
    file.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
