"""The numbers of benchmarks/text_page.py beyond the fixed merges: merges without labels, rounds, the price outside, ladders.

Records are of text_auto.py, text_rounds.py, and text_arms.py `--do price` and `nodata`; each kind has its own keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from text_account import LEAST, PLAIN, PRIMARY, rounded, shares_of, test_of

STEPS = {
    "no_text": "no text",
    "chosen": "chosen",
    "weights": "weights learnt",
    "fitted": "fitted",
    "repaired": "repaired",
}  # of text_auto.py
BY_RULE = f"{PRIMARY}, by rule"
ROUNDS = ("rounds", "rounds_penalised", "restarted", "refreshed")  # of text_rounds.py
BESIDE_ROUNDS = (PLAIN, "contrastive_penalised")  # what they are changed from
ROUNDS_PAIRS = (
    (("rounds", BY_RULE), (PLAIN, BY_RULE)),
    (("rounds", BY_RULE), ("contrastive_penalised", PRIMARY)),
    (("rounds_penalised", BY_RULE), ("contrastive_penalised", BY_RULE)),
    (("rounds_penalised", BY_RULE), ("contrastive_penalised", PRIMARY)),
    (("rounds_penalised", BY_RULE), ("rounds", BY_RULE)),
    (("restarted", PRIMARY), ("contrastive_penalised", PRIMARY)),
    (("refreshed", PRIMARY), ("restarted", PRIMARY)),
    (("refreshed", BY_RULE), ("restarted", BY_RULE)),
)  # (arm, merge) beside (arm, merge)
ONE_RATE = "repaired, 1e-3"  # repairs of before moved every factor at one rate, and their records name none
ANSWERS = (
    "written",
    "again",
    "third",
    "fourth",
)  # trainings of the plain arm whose merges were compared at written answers


def existing_of(records: dict[str, dict[str, Any]], condition: str) -> list[dict[str, Any]]:
    """Steps of benchmarks/text_auto.py: share kept of the arm's own adapters, without labels."""
    found = []
    for key in (k for k in records if k.startswith("auto_")):
        kind, seed, arm = key.split("-", 2)
        own = records[key] if "alone" in records[key] else records[f"fixed-{seed}-{arm}"]
        plain = own if arm == PLAIN else records[f"fixed-{seed}-{PLAIN}"]
        alone, floor, learnt = (np.array(x).mean(0) for x in (own["alone"], plain["floor"], plain["alone"]))
        counted = learnt - floor >= LEAST
        for step, r in records[key]["steps"].items():
            merged = np.array(r["scores"]).mean(0)
            shares = (merged - floor) / (alone - floor)
            found.append({
                "condition": condition, "arm": arm, "seed": int(seed), "positions": kind.removeprefix("auto_"),
                "step": ONE_RATE if step == "repaired" and "rate" not in r else step, "recipe": r.get("recipe", ""),
                "merged": merged.mean(), "recovered": shares[counted].mean(), "general_kl": r["general_kl"],
                "fidelity": r["fidelity"], "seconds": r["seconds_until"],
                "shares": dict(zip(records[key]["tasks"], shares.tolist(), strict=True)),
            })  # fmt: skip
    return [rounded(r) for r in found]


def summary_of(existing: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the steps of a merge without labels keep and move outside, as keys: means over trainings, merges compared at written answers.

    >>> summary_of([{"positions": "written", "step": "no text", "recovered": 0.5, "general_kl": 0.1}])
    {'recovered_no_text': 0.5, 'general_kl_no_text': 0.1}
    """
    found = {}
    for key, step in STEPS.items():
        rows = [r for r in existing if r["step"] == step and r["positions"] in ANSWERS]
        for what in ("recovered", "general_kl") if rows else ():
            found[f"{what}_{key}"] = round(float(np.mean([r[what] for r in rows])), 4)
    return found


def candidates_of(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How fidelity ranks the merges that `text_auto.py --candidates` scored by labels."""
    found = []
    for key in (k for k in records if k.startswith("auto_") and "candidates" in records[k]):
        c, (kind, seed, arm) = records[key]["candidates"], key.split("-", 2)
        best = max(c["merges"], key=lambda m: m["fidelity"])
        means = [float(np.mean(m["scores"])) for m in c["merges"]]
        found.append({
            "arm": arm, "seed": int(seed), "training": kind.removeprefix("auto_"), "merges": len(means), "rows": c["rows"],
            "rank_correlation": c["rank_correlation"], "rank_correlations": c.get("rank_correlations", {}),
            "closest": best["recipe"], "scale": best["scale"], "scores": float(np.mean(best["scores"])), "best_scores": max(means),
        })  # fmt: skip
    return [rounded(r) for r in found]


def ladders_of(records: dict[str, dict[str, Any]], condition: str) -> list[dict[str, Any]]:
    """What `text_arms.py --do nodata:SEED` saw: a row for each merge, `recovered` over its scales, of tasks that its adapters learn.

    `at_rule` is read at the rung that stands at the rule's scale, `best` at the best one, which labels name; `difference` is `best` less
    the best of the record's first merge (None of that one itself), a t interval over tasks at the two best scales.
    """
    found = []
    for key in (k for k in records if k.startswith("nodata-")):
        r, (_, seed, arm) = records[key], key.split("-", 2)
        floor, alone = (np.array(r[k]).mean(0) for k in ("floor", "alone"))
        counted, first = alone - floor >= LEAST, None
        for method, x in r["methods"].items():
            shares = ((np.array(x["scores"]).mean(1) - floor) / (alone - floor))[:, counted]  # (scales, tasks)
            means = shares.mean(1)
            top, rule = int(means.argmax()), int(np.abs(np.log(np.array(x["scales"]) / x["rule"])).argmin())
            found.append({
                "condition": condition, "arm": arm, "seed": int(seed), "method": method, "scales": list(x["scales"]), "rule": x["rule"],
                "recovered": means.tolist(), "at_rule": means[rule], "best": means[top], "best_scale": x["scales"][top],
                "edge": top in (0, len(means) - 1), "difference": None if first is None else test_of((shares[top] - first).tolist()),
            })  # fmt: skip
            first = shares[top] if first is None else first
    return [rounded(r) for r in found]


def prices_of(records: dict[str, dict[str, Any]], condition: str) -> list[dict[str, Any]]:
    """What `text_arms.py --do price:SEED` saw: a row for the bare base, for each adapter alone and for each merge of an arm."""
    found = []
    for key in (k for k in records if k.startswith("price-")):
        _, seed, arm = key.split("-", 2)
        r = records[key]
        named = {"bare base": r["base"], **{f"adapter of {t}": x for t, x in r["alone"].items()}, **r["merges"]}
        for name, x in named.items():
            found.append({
                "condition": condition, "arm": arm, "seed": int(seed), "worn": name, "alone": name.startswith("adapter of "),
                "tasks": dict(zip(r["tasks"], x["scores"], strict=True)), "perplexity": x["perplexity"], "general_kl": x["general_kl"],
            })  # fmt: skip
    return [rounded(r) for r in found]


def rounds_of(records: dict[str, dict[str, Any]], condition: str) -> list[dict[str, Any]]:
    """Arms of benchmarks/text_rounds.py and what they are changed from, of seeds that have both and the plain arm.

    `recovered` is of the gains of the row's own adapters, `of_plain` of those of the plain arm's: one yardstick for all rows.
    """
    found = []
    for seed in dict.fromkeys(k.split("-")[1] for k in records if k.startswith("rounds-")):
        plain = records.get(f"fixed-{seed}-{PLAIN}")
        if plain is None:
            continue
        floor, learnt = (np.array(plain[k]).mean(0) for k in ("floor", "alone"))
        counted = learnt - floor >= LEAST
        keys = [(a, f"fixed-{seed}-{a}") for a in BESIDE_ROUNDS] + [(a, f"rounds-{seed}-{a}") for a in ROUNDS]
        for arm, record in ((a, records[k]) for a, k in keys if k in records):
            own = np.array(record["alone"]).mean(0)
            for method, merge in ((m, record["merges"][m]) for m in (BY_RULE, PRIMARY) if m in record["merges"]):
                merged = np.array(merge["scores"]).mean(0)
                yardstick = (merged - floor) / (learnt - floor)
                found.append({
                    "condition": condition, "arm": arm, "seed": int(seed), "method": method, "scale": merge["scale"],
                    "individual": own.mean(), "merged": merged.mean(), **shares_of(plain, own, merged),
                    "of_plain": yardstick[counted].mean(),
                    "of_plain_tasks": {t: float(x) for t, x, c in zip(record["tasks"], yardstick, counted, strict=True) if c},
                    "general_kl": merge["general_kl"], "general_kl_alone": max(record["general_kl_alone"].values()),
                    **({"floor_again": float(np.mean(record["floor"]))} if arm in ROUNDS else {}),
                })  # fmt: skip
    return [rounded(r) for r in found]


def rounds_differences(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each change adds to the share of the plain arm's own gains: t over tasks, each the mean over conditions and seeds of both."""
    by = {((r["arm"], r["method"]), r["condition"], r["seed"]): r["of_plain_tasks"] for r in rows}
    found = []
    for one, other in ROUNDS_PAIRS:
        pairs = [(x, by[other, c, s]) for (which, c, s), x in by.items() if which == one and (other, c, s) in by]
        off = [
            float(np.mean([x[t] - y[t] for x, y in pairs if t in x]))
            for t in dict.fromkeys(t for x, _ in pairs for t in x)
        ]
        if len(off) > 1:
            found.append({"arm": list(one), "against": list(other), "seeds": len(pairs), **test_of(off)})
    return [rounded(d) for d in found]
