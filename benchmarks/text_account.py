"""The numbers of benchmarks/text_page.py: records of text_arms.py as rows, comparisons over tasks, what was expected, references.

A record is one JSON file of RUN/records: scores in percent as (halves, tasks).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from intervals import t_interval

ARMS = (
    "kaiming", "kaiming_penalised", "osrm_mean", "contrastive", "contrastive_penalised",
    "orthonormal_shared_penalised", "contrastive_curved", "kaiming_drawn",
)  # fmt: skip
SPOKEN_OF = ARMS[:5]  # what was expected was of these; the others came later
PRIMARY, LEAST = "task_arithmetic", 4.0
PLAIN, JOINT = "kaiming", "joint"  # what people have; one adapter trained on all tasks: a reference
CONDITIONS = {"told": "each task's instruction and cue", "bare": "no instruction, one cue for all tasks"}
DEVELOPED = ("snli", "banking77", "clinc_domain")  # used while plait was developed; the other tasks never
REGISTERED = (("contrastive", "kaiming"), ("contrastive_penalised", "contrastive"))
DESCRIBED = (("kaiming_penalised", "kaiming"), ("osrm_mean", "kaiming"), ("contrastive_penalised", "kaiming"))


def read(run: Path) -> dict[str, dict[str, Any]]:
    """Kind-seed-arm -> record."""
    return {f.stem: json.loads(f.read_text()) for f in sorted((run / "records").glob("*.json"))}


def rows_of(
    records: dict[str, dict[str, Any]], condition: str = "told", floor: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """A row for each arm and merge of one condition; `floor` is another study's plain record, for seeds that have none."""
    rows = []
    for seed in sorted({k.split("-")[1] for k in records if k.startswith("fixed-")}):
        plain = records.get(f"fixed-{seed}-{PLAIN}") or floor
        for arm in (a for a in ARMS if f"fixed-{seed}-{a}" in records):
            record = records[f"fixed-{seed}-{arm}"]
            names, own = record["tasks"], np.array(record["alone"]).mean(0)
            for method, merge in record["merges"].items():
                merged = np.array(merge["scores"]).mean(0)
                rows.append({
                    "condition": condition, "arm": arm, "method": method, "seed": int(seed), "scale": merge["scale"],
                    "individual": own.mean(), "merged": merged.mean(), "of_own": (merged / own).mean(),
                    "general_kl": merge["general_kl"], "general_kl_alone": max(record["general_kl_alone"].values()),
                    "norm": float(np.mean(list(record["norms"].values()))),
                    "tasks": dict(zip(names, merged.tolist(), strict=True)),
                    "alone": dict(zip(names, own.tolist(), strict=True)),
                    **(shares_of(plain, own, merged) if plain else {}),
                })  # fmt: skip
    return [rounded(r) for r in rows]


def shares_of(plain: dict[str, Any], own: np.ndarray, merged: np.ndarray) -> dict[str, Any]:
    """What a merge keeps of its arm's own gains over the bare base, on tasks that the plain arm learns.

    Args:
        plain: The plain arm's record.
        own: Scores of the adapters alone, (tasks,).
        merged: Scores of the merge, (tasks,).
    """
    names, floor = plain["tasks"], np.array(plain["floor"]).mean(0)
    counted = np.array(plain["alone"]).mean(0) - floor >= LEAST
    share = (merged - floor) / (own - floor)
    return {
        "floor": floor.mean(), "recovered": share[counted].mean(),
        "share_of_means": (merged - floor)[counted].sum() / (own - floor)[counted].sum(),
        "floors": dict(zip(names, floor.tolist(), strict=True)),
        "shares": {n: float(s) for n, s, c in zip(names, share, counted, strict=True) if c},
    }  # fmt: skip


def rounded(value: Any) -> Any:
    """Numbers to four places, in whatever holds them."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(float(value), 4) if isinstance(value, float | np.floating) else value


def test_of(differences: Sequence[float]) -> dict[str, float]:
    """A mean over tasks: t interval and p, and the p of exact sign flips."""
    t = t_interval(differences)
    flips = np.array(list(itertools.product((-1.0, 1.0), repeat=t.n))) @ np.array(differences) / t.n
    return {
        "n": t.n, "difference": t.mean, "low": t.low, "high": t.high, "p": t.p,
        "p_flips": float((np.abs(flips) >= abs(t.mean) - 1e-12).mean()), "smallest_p_flips": 2.0 / 2**t.n,
    }  # fmt: skip


def references_of(records: dict[str, dict[str, Any]], condition: str = "told") -> list[dict[str, Any]]:
    """One adapter trained on all tasks together, beside the plain arm's own adapters of that seed; `joint_STEPS` trained for so many."""
    rows = []
    for key in (k for k in records if k.startswith("fixed-") and k.split("-", 2)[2].startswith(JOINT)):
        _, seed, name = key.split("-", 2)
        plain, scores = records.get(f"fixed-{seed}-{PLAIN}"), np.array(records[key]["alone"]).mean(0)
        if plain is None:
            continue
        floor, own = (np.array(plain[k]).mean(0) for k in ("floor", "alone"))
        counted = own - floor >= LEAST
        share = ((scores - floor) / (own - floor))[counted].mean()
        tasks = dict(zip(plain["tasks"], scores.tolist(), strict=True))
        rows.append({
            "condition": condition, "reference": name, "seed": int(seed), "score": scores.mean(), "recovered": share, "tasks": tasks,
        })  # fmt: skip
    return [rounded(r) for r in rows]


def tests_of(
    rows: Sequence[dict[str, Any]], seeds: Sequence[int] = (), *, registered_study: bool = True
) -> list[dict[str, Any]]:
    """The registered comparisons and some others, each also over the tasks that were never used in development.

    A task's share is the mean over its conditions and seeds; `seeds` are those that count, all where none is named.
    """

    def shares(arm: str) -> dict[str, float]:
        mine = [
            r["shares"]
            for r in rows
            if "shares" in r and r["arm"] == arm and r["method"] == PRIMARY and (not seeds or r["seed"] in seeds)
        ]
        names = dict.fromkeys(t for s in mine for t in s)
        return {t: float(np.mean([s[t] for s in mine if t in s])) for t in names}

    tests = []
    for arm, against in (*REGISTERED, *DESCRIBED):
        a, b = shares(arm), shares(against)
        for which in ("all", "never used in development"):
            names = [t for t in a if t in b and (which == "all" or t not in DEVELOPED)]
            if len(names) < 2:  # an arm that this study does not have
                continue
            tests.append({"arm": arm, "against": against, "tasks": which, **test_of([a[t] - b[t] for t in names])})
    for t in tests:
        t["registered"] = registered_study and (t["arm"], t["against"]) in REGISTERED and t["tasks"] == "all"
    registered = sorted((t for t in tests if t["registered"]), key=lambda t: t["p"])
    worst = 0.0
    for i, t in enumerate(registered):  # Holm over the registered ones
        worst = t["p_holm"] = max(worst, min(1.0, (len(registered) - i) * t["p"]))
    return [rounded(t) for t in tests]


def expected_of(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What was expected of the tested seeds, each with what came: the least of what it speaks of."""

    def kept(arm: str, method: str, condition: str) -> float:
        mine = [
            r["recovered"]
            for r in rows
            if (r["arm"], r["method"], r["condition"]) == (arm, method, condition) and (not seeds or r["seed"] in seeds)
        ]
        return float(np.mean(mine)) if mine else float("nan")

    best = "contrastive_penalised"
    found = [
        {"expected": f"`{best}`, {c}: at least {least}", "least": least, "came": kept(best, PRIMARY, c)}
        for c, least in (("told", 0.9), ("bare", 0.8))
    ]
    for c in CONDITIONS:
        arm = min(SPOKEN_OF, key=lambda a: kept(a, "regmean", c))
        what = f"RegMean, {c}: at least 0.75 in every arm; the least, `{arm}`"
        found.append({"expected": what, "least": 0.75, "came": kept(arm, "regmean", c)})
        others = ("task_arithmetic", "ties", "dare_ties", "knots", "core_space")
        most = max(others, key=lambda m: kept("kaiming", m, c))
        least = kept("kaiming", most, c)
        what = f"`kaiming`, {c}: TSV-M more than {', '.join(others)}; the most of them, {most}"
        found.append({"expected": what, "least": least, "came": kept("kaiming", "tsv", c)})
    return [rounded(r) for r in found if not np.isnan(r["came"])]


def singles_of(records: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Mean score over all tasks of each single adapter of the plain arm, and of each on its own task, on the curves' rows."""
    for r in records.values():
        if r.get("crossed"):
            found = {f"adapter of {t}": float(np.mean(x)) for t, x in r["crossed"].items()}
            return rounded(
                {**found, "each on its own task": float(np.mean(r["alone"])), "bare base": float(np.mean(r["floor"]))}
            )
    return {}


def packed(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Curves over scales without single tasks, as benchmarks/scales.py reads them."""
    found = []
    for key, r in records.items():
        kind, seed, arm = key.split("-", 2)
        if kind == "curves":
            ends = {k: np.array(r[k]).mean(1).round(2).tolist() for k in ("floor", "alone")}
            methods = {
                m: {
                    "scales": [round(s, 6) for s in x["scales"]],
                    "moments": x["moments"],
                    "scores": np.array(x["scores"]).mean(2).round(2).tolist(),
                }
                for m, x in r["methods"].items()
            }
            found.append({"arm": arm, "seed": int(seed), "tasks": r["tasks"], **ends, "methods": methods})
    return found
