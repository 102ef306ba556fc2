"""The archived studies by the second protocol: shares kept of own adapters, at scales that no label chose, beside the first protocol.

    PYTHONPATH=src:benchmarks python -P benchmarks/second_protocol.py --results docs/results

Reads every RESULTS/*.tar.xz and RESULTS/scales-mpnet.json; writes RESULTS/second-protocol.json (`rows` of {study, base, tasks, arm,
method, seeds, counted, label_free, by_moments, by_labels, first}, `tests`) and RESULTS/second-protocol.md. A task's share is (merged -
floor) / (own adapter alone - floor), the floor being the bare base with the arm's own head; tasks count where the plain adapter and the
arm's own gain at least 4 points each: the share of a smaller gain would be one of noise. *label free*: at the scale that the rule gives
for so many adapters, read between the scored scales over log scale. *by moments*: at the scale that second moments gave adapters of
the same recipe and number at another seed (RESULTS/scales-mpnet.json), where there were any. *by labels*: each half at the scale that
the other half's labels chose. *first*: the first protocol's number for the same merge, the share of means of the best plain arm's gain.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from intervals import t_interval
from scales import read, rule_of

from plait.evaluation.splits import HALVES
from plait.merging.scales import REACH, reach_of
from plait.report.table import recovered, reference, task_means
from plait.runs.folder import layout_of_folder
from plait.runs.layout import Layout
from plait.runs.units import ALONE, FOLDS, MERGE, Unit
from plait.runs.waves import all_units, result

LEAST = 4.0  # points that the plain adapter and the arm's own gain at least over their floors
PLAIN, PRIMARY = "kaiming", "task_arithmetic"
AGAINST = ("contrastive_penalised", "contrastive", "kaiming_penalised", "osrm_mean", "osrm")
KINDS = ("label_free", "by_moments", "by_labels")


@dataclass(frozen=True, slots=True)
class Merge:
    """One merge of one arm and seed of a study.

    Args:
        study, base, tasks: The study's name, its base, its number of tasks.
        arm, method, seed: Which; the method with its calibration.
        shares: Kind of scale -> task -> share kept; tasks that count alone.
        first: Recovered as the first protocol has it.
    """

    study: str
    base: str
    tasks: int
    arm: str
    method: str
    seed: int
    shares: Mapping[str, Mapping[str, float]]
    first: float


def merges_of(layout: Layout, moments: Mapping[tuple[int, str, str], float]) -> Iterator[Merge]:
    """Every merge without options of its own."""
    specs = {m.name: m for m in layout.recipe.merge_specs}
    units = [u for u in all_units(layout) if u.stage == MERGE and u.split == FOLDS and not u.variant]
    for unit in dict.fromkeys(units):
        spec = specs[unit.merge]
        if spec.options:
            continue
        method = (spec.method or spec.name) + (f" + {spec.calibrate}" if spec.calibrate else "")
        ends = reference(layout, unit.seed)
        tasks, scored = shares_of(layout, unit, method, moments), result(layout, unit)
        merged = mean(mean(scored["halves"][h]["score"].values()) for h in HALVES)
        yield Merge(
            layout.recipe.name, Path(layout.recipe.base.model).name, len(layout.tasks), unit.arm, method, unit.seed,
            tasks, float(recovered(merged, *ends.over(layout.tasks))),
        )  # fmt: skip


def shares_of(
    layout: Layout, unit: Unit, method: str, moments: Mapping[tuple[int, str, str], float]
) -> dict[str, dict[str, float]]:
    """Kind of scale -> task -> share kept, of the tasks that the plain adapters learn."""
    alone = result(layout, replace(unit, stage=ALONE, merge=""))
    own, floor = task_means(alone, "alone"), task_means(alone, "floor")
    ends, scored = reference(layout, unit.seed), result(layout, unit)
    names = [t for t in own if min(ends.alone[t] - ends.floor[t], own[t] - floor[t]) >= LEAST]
    chosen = {h: scored["halves"][h]["scale"] for h in HALVES}
    scales = {"label_free": dict.fromkeys(HALVES, rule_of(method, len(own))), "by_labels": chosen}
    if by := moments.get((len(own), unit.arm, method)) if "mpnet" in layout.recipe.base.model else None:
        scales["by_moments"] = dict.fromkeys(HALVES, by)

    def curve(half: str, task: str) -> list[tuple[float, float]]:
        return sorted((g["scale"], g["tasks"][task]) for g in scored["grid"] if g["part"] == half)

    return {
        kind: {
            t: (mean(read(curve(h, t), at[h]) for h in HALVES) - floor[t]) / (own[t] - floor[t])
            for t in names
        }
        for kind, at in scales.items()
    }  # fmt: skip


def scales_by_moments(file: Path) -> dict[tuple[int, str, str], float]:
    """Number of tasks, arm, method -> the scale that base moments said, geometric mean over the seeds measured."""
    logs: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    for r in json.loads(file.read_text()):
        for method, reach in r["reach"]["base"].items():
            name, _, calibration = method.partition(" + ")
            if " own" not in method:
                logs[len(r["tasks"]), r["arm"], method].append(np.log(reach * reach_of(name, calibration or None)))
    return {k: float(np.exp(np.mean(v))) for k, v in logs.items()}


def rows_of(merges: Sequence[Merge]) -> list[dict[str, Any]]:
    """A row for each study, arm and method: means over seeds."""
    cells: dict[tuple[Any, ...], list[Merge]] = defaultdict(list)
    for m in merges:
        cells[m.study, m.base, m.tasks, m.arm, m.method].append(m)
    return [
        {
            "study": study, "base": base, "tasks": tasks, "arm": arm, "method": method, "seeds": len(cell),
            "counted": min(len(m.shares["by_labels"]) for m in cell),
            **{k: round(mean(mean(m.shares[k].values()) for m in cell if m.shares[k]), 4) for k in KINDS if cell[0].shares.get(k)},
            "first": round(mean(m.first for m in cell), 4),
        }
        for (study, base, tasks, arm, method), cell in cells.items()
    ]  # fmt: skip


def tests_of(merges: Sequence[Merge]) -> list[dict[str, Any]]:
    """Differences of share kept under the primary merge, an arm against PEFT's default, over tasks; seeds of a task averaged."""
    shares: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for m in (m for m in merges if m.method == PRIMARY):
        for kind, by in m.shares.items():
            for task, share in by.items():
                shares[m.study, m.arm, kind][task].append(share)
    tests = []
    for study, kind in dict.fromkeys((s, k) for s, _, k in shares):
        for arm in AGAINST:
            a, b = shares.get((study, arm, kind), {}), shares.get((study, PLAIN, kind), {})
            names = [t for t in a if t in b]
            if len(names) > 1:
                i = t_interval([mean(a[t]) - mean(b[t]) for t in names])
                tests.append({
                    "study": study, "arm": arm, "against": PLAIN, "scale": kind, "n": i.n,
                    **{k: round(v, 4) for k, v in (("difference", i.mean), ("low", i.low), ("high", i.high), ("p", i.p))},
                })  # fmt: skip
    return tests


def page(rows: Sequence[Mapping[str, Any]], tests: Sequence[Mapping[str, Any]]) -> str:
    """Both protocols side by side, and the comparisons."""
    lines = ["# The older studies by the second protocol", "", ABOUT, ""]
    head = "| arm | merge | label-free | by moments | by labels | first protocol |"
    for study in dict.fromkeys(r["study"] for r in rows):
        mine = [r for r in rows if r["study"] == study and r["arm"] in (PLAIN, *AGAINST)]
        seeds = max(r["seeds"] for r in mine)
        lines += [
            f"## {study}",
            "",
            f"{mine[0]['base']}, {mine[0]['tasks']} tasks, {seeds} seed{'s' * (seeds > 1)}; percent.",
            "",
        ]
        lines += [head, "|---" * 6 + "|"]
        for r in mine:
            cells = [f"{100 * r[k]:.0f}" if k in r else "" for k in (*KINDS, "first")]
            lines.append(f"| `{r['arm']}` | {r['method']} | {' | '.join(cells)} |")
        if theirs := [t for t in tests if t["study"] == study]:
            lines += [
                "",
                "| task arithmetic, difference of share kept | scale | points | 95 % (t over tasks) | p |",
                "|---" * 5 + "|",
            ]
            lines += [
                f"| `{t['arm']}` - `{t['against']}` ({t['n']} tasks) | {t['scale'].replace('_', ' ')} | {100 * t['difference']:+.0f} | "
                f"{100 * t['low']:+.0f} to {100 * t['high']:+.0f} | {t['p']:.3f} |"
                for t in theirs
            ]
        lines.append("")
    return "\n".join(lines)


ABOUT = f"""Recomputed from the archives by `python benchmarks/second_protocol.py --results docs/results`. A task's share is
(merged - floor) / (own adapter alone - floor); the mean is over the tasks where the plain adapter and the arm's own gain at least {LEAST:g}
points each over the floor, the bare base with the arm's head. *Label-free*: at the scale of the rule for so many adapters, read between the
scored scales. *By moments*: at the scale that the second moments ({REACH:g} times the reach) of adapters of the same recipe at another seed
said, which plait takes where statistics are at hand; measured for two arms on MPNet alone. *By labels*: each half at the scale the other
half chose. *First protocol*: recovered of the same merge, scale by labels, the share of means of the best plain arm's gain.

A scale by rule knows nothing of an update's length: arms that start or train short (`contrastive`, the penalised) are merged too weakly
by it. Merges at single scales are on 250 rows of each half, the adapters alone on all. Some arms are shown;
the rows beside this page hold all."""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", required=True, type=Path)
    a = p.parse_args()
    moments, merges = scales_by_moments(a.results / "scales-mpnet.json"), []
    for archive in sorted(a.results.glob("*.tar.xz")):
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            merges += merges_of(layout_of_folder(next(Path(folder).iterdir())), moments)
    rows, tests = rows_of(merges), tests_of(merges)
    (a.results / "second-protocol.json").write_text(json.dumps({"rows": rows, "tests": tests}, indent=1) + "\n")
    text = page(rows, tests)
    (a.results / "second-protocol.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
