"""The page of runs of benchmarks/text_arms.py: what each arm keeps under merges fixed beforehand, the registered tests, the scales.

    python benchmarks/text_page.py told=RUN [bare=RUN] --name text-qwen15 --to docs/results [--tested 1,2]

A RUN for each condition of the prompts holds records/*.json. Writes NAME.md and NAME.json (`rows` of {condition, arm, method, seed,
individual, floor, merged, recovered, share_of_means, of_own, tasks}, `tests` over the seeds `tested`, `expected`, `existing`, `references`,
`singles`; of text_rounds.py `rounds` and `rounds_differences`); where curves were run, scales-NAME.json for benchmarks/scales.py.
`--tested` names the seeds of the comparisons; by default all. The plain arm's record holds the floor: without it there is no share kept,
and `of_own`, merged over alone, is all the page shows.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from intervals import t_interval

ARMS = (
    "kaiming", "kaiming_penalised", "osrm_mean", "contrastive", "contrastive_penalised",
    "orthonormal_shared_penalised", "contrastive_curved", "kaiming_drawn",
)  # fmt: skip
SPOKEN_OF = ARMS[:5]  # what was expected was of these; the others came later
MAIN, STUDIES = "text-qwen15", Path(__file__).parents[1] / "recipes" / "studies"
PRIMARY, LEAST = "task_arithmetic", 4.0
SHOWN = ("individual", "scale", "merged", "recovered", "share_of_means", "general_kl", "general_kl_alone")
PLAIN, JOINT = "kaiming", "joint"  # what people have; one adapter trained on all tasks: a reference
CONDITIONS = {"told": "each task's instruction and cue", "bare": "no instruction, one cue for all tasks"}
DEVELOPED = ("snli", "banking77", "clinc_domain")  # used while plait was developed; the other tasks never
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
    return [_rounded(r) for r in rows]


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


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
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
    return [_rounded(r) for r in rows]


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
    return [_rounded(t) for t in tests]


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
    return [_rounded(r) for r in found if not np.isnan(r["came"])]


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
    return [_rounded(r) for r in found]


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
    return [_rounded(r) for r in found]


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
    return [_rounded(r) for r in found]


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
    return [_rounded(r) for r in found]


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
    return [_rounded(d) for d in found]


def singles_of(records: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Mean score over all tasks of each single adapter of the plain arm, and of each on its own task, on the curves' rows."""
    for r in records.values():
        if r.get("crossed"):
            found = {f"adapter of {t}": float(np.mean(x)) for t, x in r["crossed"].items()}
            return _rounded(
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


def extent_of(study: str) -> str:
    """What a study's recipe says of tasks, adapters and steps."""
    if study == MAIN:
        return "nine tasks, every answer written; rank 16 on q and v, 120\nsteps of 16 rows at 3e-4"
    recipe = yaml.safe_load((STUDIES / f"{study}.yaml").read_text())
    lora, training = recipe["lora"], recipe["training"]
    modules = ", ".join(m.removesuffix("_proj") for m in lora["target_modules"])
    return (
        f"{len(recipe['tasks'])} tasks, every answer written;\nrank {lora['rank']} on {modules}, {training['steps']} steps of "
        f"{training['batch_size']} rows at {training['lr']:g} (where nothing else is said)"
    )


def base_of(study: str) -> str:
    """The name of the model that a study's recipe names."""
    name: str = yaml.safe_load((STUDIES / f"{study}.yaml").read_text())["base"]["model"]
    return name.rpartition("/")[2]


INTRODUCTION = """# {name}

{extent}. A copy of {base}, de-quantised from 4 bits; \
{extent_of_study}. Arms, merges and scales were fixed beforehand ([protocol, second edition](../study/protocol.md)); no label has a
say in any row of the first table. 240 rows a task{curves}.

    {commands}

`{name}-run.tar.gz` holds what was measured of every answer; unpacked, its {conditions} the last command.

{measure} *KL*: base to merge, nats a token on 200 general sentences; *single*: the largest of the arm's own
adapters. Task arithmetic at the scale that second moments say is the primary merge.{regmean}
"""
SHARE = """\
*share kept*: mean over tasks of (merged - floor) / (own adapter alone - floor), mean over seeds (least and most beside it); *of means*: the
share of the mean gain. The floor, the bare base with the same prompts and as many tokens as the longest right answer has (GSM8K:
about 110), scores {floor}.{borrowed}"""
BORROWED = """ It was scored with the adapters of text-qwen15: the same base, prompts and rows; so was which tasks count,
those on which PEFT's default of rank 16 on q and v gains four points. **The plain arm of this study is missing: the time of the GPU ended
before it was scored**, and PEFT's default does not stand beside these arms."""
RATIO = """\
**The plain arm and the bare base are missing: the time of the GPU ended before they were scored.** So there is no floor and no
*share kept*, and PEFT's default does not stand beside these arms. *Of own score*: mean over tasks of merged / own adapter alone,
which counts what the bare base can do by itself as kept; it says less than the share kept."""
REGMEAN_THEN = """ RegMean of seed 0 stands at the scale its rule said then, far too large here: see the curves; plait reads
it off the moments since."""


def page(
    name: str,
    runs: dict[str, dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    tests: Sequence[dict[str, Any]],
    references: Sequence[dict[str, Any]],
    tested: Sequence[int] = (),
    study: str = MAIN,
    borrowed: bool = False,
) -> str:
    """The page.

    Args:
        name: Of its files.
        runs: Condition -> its records.
        rows: Of all conditions.
        tests: Comparisons.
        references: Joint training.
        tested: Seeds of the comparisons; () for all.
        study: The recipe's name.
        borrowed: Whether the floor is another study's.
    """
    conditions = {c: sorted({r["seed"] for r in rows if r["condition"] == c}) for c in runs}
    extent = "; ".join(
        f"**Condition *{c}*** ({CONDITIONS[c]}): seed{'s' * (len(s) > 1)} {', '.join(map(str, s))}"
        for c, s in conditions.items()
    )
    floored, curves = all("floor" in r for r in rows), any(k.startswith("curves-") for r in runs.values() for k in r)
    measure = RATIO
    if floored:
        floors = {(r["condition"], r["seed"]): r["floor"] for r in rows}
        by = (
            f"{np.mean([f for (c, _), f in floors.items() if c == condition]):.1f} ({condition})" for condition in runs
        )
        measure = SHARE.format(floor=", ".join(by), borrowed=BORROWED if borrowed else "")
    folders = " and ".join(f"{c}/" for c in runs) + (" is the RUN" if len(runs) == 1 else " are the RUNs") + " of"
    todo = " ".join(f"train:{s} fixed:{s}" for s in dict.fromkeys(s for seeds in conditions.values() for s in seeds))
    todo += " curves:0" * curves
    rounds = [r for c, records in runs.items() for r in rounds_of(records, c)]
    seeds = f" --tested {','.join(map(str, tested))}" if tested else ""
    commands = "\n    ".join((
        "python benchmarks/text_tasks.py --data DATA --to TASKS",
        f'python benchmarks/text_arms.py --study recipes/studies/{study}.yaml [--condition bare] --do "{todo}" ...',
        *(["python benchmarks/text_auto.py --study recipes/studies/text-qwen15.yaml --seed 1 ..."] if study == MAIN else []),
        *([f"python benchmarks/text_rounds.py --study recipes/studies/{study}.yaml --seed 1 ..."] if rounds else []),
        f"python benchmarks/text_page.py {' '.join(f'{c}=RUN' for c in runs)} --name {name} --to docs/results{seeds}",
    ))  # fmt: skip
    then = REGMEAN_THEN if study == MAIN and 0 in conditions.get("told", []) else ""
    text = [
        INTRODUCTION.format(
            name=name, base=base_of(study), extent_of_study=extent_of(study),
            extent=extent, commands=commands, regmean=then, measure=measure,
            curves=", 100 for the curves" * curves, conditions=folders,
        )
    ]  # fmt: skip
    for condition, records in runs.items():
        mine = [r for r in rows if r["condition"] == condition]
        text += [f"## {condition}: what is kept under merges fixed beforehand", "", _table(mine), ""]
        text += ["### Task by task, primary merge", "", _tasks(mine), ""]
        for r in (r for r in references if r["condition"] == condition):
            text += [
                f"One adapter trained on all nine tasks together{_steps_of(r['reference'])}, seed {r['seed']}: {r['score']:.1f}, "
                f"{100 * r['recovered']:.0f} % of what `kaiming`'s own adapters gain.{OF_JOINT * (r['reference'] == JOINT)}", "",
            ]  # fmt: skip
        singles = [(v, k) for k, v in singles_of(records).items() if k.startswith("adapter")]
        if singles:
            text += [
                f"One adapter for everything: the best of `kaiming`'s, the {max(singles)[1]}, has {max(singles)[0]:.1f} (100 rows a task).",
                "",
            ]
    if tests:
        which = (
            f"Seeds {' and '.join(map(str, tested))}, on which nothing was chosen; conditions"
            if tested
            else "Conditions"
        )
        text += [
            "## Comparisons under the primary merge",
            "",
            f"{which} and seeds of a task averaged.",
            "",
            _tests(tests),
            "",
        ]
    if tested:
        text += ["## What was expected, and what came", "", _expected(expected_of(rows, tested)), ""]
    if existing := [r for c, records in runs.items() for r in existing_of(records, c)]:
        text += ["## Adapters that exist, merged without labels", "", EXISTING, "", _existing(existing), ""]
        text += [line for records in runs.values() for r in candidates_of(records) for line in (_candidates(r), "")]
    if prices := [r for c, records in runs.items() for r in prices_of(records, c)]:
        text += ["## What it costs outside the tasks", "", _prices(prices), ""]
    if rounds:
        text += ["## Rounds, and moments refreshed halfway", "", _rounds(rounds), ""]
    text += ["## Recovered over scales", ""] if curves else []
    text += [
        f"### {c}\n\n{_curves(records)}\n"
        for c, records in runs.items()
        if any(k.startswith("curves-") for k in records)
    ]
    return "\n".join(text)


OF_JOINT = """ It takes as many steps as one adapter, each of 16 rows of every task, at the same rate: too few for the 77 intents
of BANKING77, so that it is no upper bound."""
EXISTING = """\
`benchmarks/text_auto.py`: 100 training prompts of each task, each answered by the task's own adapter; merges are compared with the
adapters at the positions named, and no label is read. *No text* is TSV-M at its default scale; *chosen* is the merge of the highest
fidelity among four methods with and without pico, over scales that grow at the edge; *weights learnt* multiplies its parts by
numbers per adapter and module, found in 100 steps. At all positions the choice by itself is not shown: by a fault of the script,
mended since, it was scored at its scale squared. Seconds on one H200 that scored other arms at the same time, writing the answers
left out. *Again*, *third* and *fourth* are the same seed trained anew (trainings on a GPU differ), compared at written answers. A repair
was tried where a row says so: in *written* (100 prompts a task) and *third* (250) at 1e-3 for every factor, was kept in neither, and
the row is the merge that it began at; in *fourth* (250) at 3 % and at 1 % of each factor's root mean square, rising at first, and kept
at both. *Fitted on all* reads the 250 prompts too."""


def _steps_of(reference: str) -> str:
    """The steps that a reference's name ends in, in words."""
    return f" for {reference.rpartition('_')[2]} steps" if "_" in reference else ""


def _expected(found: Sequence[dict[str, Any]]) -> str:
    lines = ["| expected, share kept | came | of |", "|---|---|---|"]
    for r in found:
        verdict = "as expected" if r["came"] >= r["least"] else "**not so**"
        lines.append(f"| {r['expected']} | {r['came']:.2f} ({verdict}) | {r['least']:.2f} |")
    return "\n".join(lines)


def _existing(found: Sequence[dict[str, Any]]) -> str:
    lines = ["| adapters | positions | step | merged | share kept, % | KL | fidelity | seconds |", "|---" * 8 + "|"]
    for r in found:
        of = f" ({r['recipe']})" if r["recipe"] else ""
        lines.append(
            f"| `{r['arm']}`, {r['condition']}, seed {r['seed']} | {r['positions']} | {r['step']}{of} | {r['merged']:.1f} | "
            f"**{100 * r['recovered']:.0f}** | {r['general_kl']:.3f} | {r['fidelity']:.2f} | {r['seconds']:.0f} |"
        )
    names = list(found[0]["shares"])
    lines += [
        "",
        "Share kept of each task, in percent:",
        "",
        "| step | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    lines += [f"| {r['step']} | " + " | ".join(f"{100 * r['shares'][n]:.0f}" for n in names) + " |" for r in found]
    return "\n".join(lines)


ROUNDS_TEXT = """\
`benchmarks/text_rounds.py`, as many steps in all as every other arm. `rounds` is `kaiming` in four parts of a quarter of the steps, after
each of which all tasks' adapters are merged by task arithmetic at the rule's scale; the base goes on with the sum of the merges, beside
new factors. `rounds_penalised` is `contrastive_penalised` so, its moments those of the bare base in every round. *Merged* is the sum of the
four merges (the scale shown is that of each), *alone* each task's last adapter with the three merges before it. `restarted` is
`contrastive_penalised` with a new AdamW after half of the steps; `refreshed` goes on from the same half with all moments taken anew, each
task's with its own adapter on. *Of own gain* is the share kept of the row's own adapters, which in rounds hold other tasks' merges too;
*of `kaiming`'s gain* measures every row by what `kaiming`'s adapters of that seed gain alone. `kaiming` and `contrastive_penalised` are
those of the tables above, of the same seeds."""


PRICES_TEXT = """\
`text_arms.py --do price:SEED --elsewhere STUDY.yaml:TASKS`: {tasks}, which no adapter here was trained on, told as in their own study,
and the perplexity of the general sentences. *Alone* is the mean over the arm's adapters, and the worst of them."""


def _prices(rows: Sequence[dict[str, Any]]) -> str:
    """The bare base once, then a line for each arm's adapters and each of its merges."""
    tasks = list(rows[0]["tasks"])
    cells = lambda group: [  # noqa: E731
        *(f"{np.mean([r['tasks'][t] for r in group]):.1f}" for t in tasks), f"{np.mean([r['perplexity'] for r in group]):.2f}",
        f"{np.mean([r['general_kl'] for r in group]):.3f}",
    ]  # fmt: skip
    head = ["arm", "seeds", "", *tasks, "perplexity", "KL"]
    lines = [PRICES_TEXT.format(tasks=" and ".join(tasks)), "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    bare = [r for r in rows if r["worn"] == "bare base"]
    lines.append(f"| | | bare base | {' | '.join(cells(bare))} |")
    for condition, arm in dict.fromkeys((r["condition"], r["arm"]) for r in rows):
        mine = [r for r in rows if (r["condition"], r["arm"]) == (condition, arm)]
        seeds = f"{condition}, {', '.join(map(str, sorted({r['seed'] for r in mine})))}"
        alone = [r for r in mine if r["alone"]]
        lines.append(f"| `{arm}` | {seeds} | alone | {' | '.join(cells(alone))} |")
        worst = [f"{min(r['tasks'][t] for r in alone):.1f}" for t in tasks]
        ends = [f"{max(r['perplexity'] for r in alone):.2f}", f"{max(r['general_kl'] for r in alone):.3f}"]
        lines.append(f"| | | alone, the worst | {' | '.join([*worst, *ends])} |")
        for name in dict.fromkeys(r["worn"] for r in mine if r["worn"] != "bare base" and not r["alone"]):
            lines.append(f"| | | {name} | {' | '.join(cells([r for r in mine if r['worn'] == name]))} |")
    return "\n".join(lines)


def _rounds(rows: Sequence[dict[str, Any]]) -> str:
    """What was done, a line for each merge, and what the changes add."""
    lines = [
        ROUNDS_TEXT,
        "",
        "| arm | seeds | merge | scale | alone | merged | of own gain, % | of means | of `kaiming`'s gain, % | KL | single |",
        "|---" * 11 + "|",
    ]
    for key in dict.fromkeys((r["condition"], r["arm"], r["method"]) for r in rows):
        group = [r for r in rows if (r["condition"], r["arm"], r["method"]) == key]
        mean = {k: float(np.mean([r[k] for r in group])) for k in (*SHOWN, "of_plain")}
        seeds = f"{key[0]}, {', '.join(str(r['seed']) for r in group)}"
        lines.append(
            f"| `{key[1]}` | {seeds} | {key[2]} | {mean['scale']:.2f} | {mean['individual']:.1f} | {mean['merged']:.1f} | "
            f"{100 * mean['recovered']:.0f} | {100 * mean['share_of_means']:.0f} | **{100 * mean['of_plain']:.0f}** | "
            f"{mean['general_kl']:.3f} | {mean['general_kl_alone']:.3f} |"
        )
    again = {(r["condition"], r["arm"], r["seed"]): r["floor_again"] for r in rows if "floor_again" in r}
    scored = f"and {np.mean(list(again.values())):.1f} where it was scored again beside these arms"
    lines += ["", f"The bare base scores {np.mean([r['floor'] for r in rows]):.1f}, {scored}."]
    if missing := [f"`{a}`" for a in ROUNDS if a not in {r["arm"] for r in rows}]:
        lines[-1] += f" Not run: {', '.join(missing)}."
    if differences := rounds_differences(rows):
        lines += [
            "",
            "| difference of the share of `kaiming`'s gain | tasks | points | 95 % (t over tasks) | p |",
            "|---" * 5 + "|",
        ]
        lines += [
            f"| {_of_arm(d['arm'])} - {_of_arm(d['against'])} | {d['n']} | {100 * d['difference']:+.0f} | "
            f"{100 * d['low']:+.0f} to {100 * d['high']:+.0f} | {d['p']:.3f} |"
            for d in differences
        ]
    return "\n".join(lines)


def _of_arm(which: Sequence[str]) -> str:
    """An arm and the scale of its merge."""
    return f"`{which[0]}` ({'by rule' if which[1] == BY_RULE else 'by moments'})"


def _candidates(r: dict[str, Any]) -> str:
    """How the merges that were looked at rank, in a sentence."""
    return (
        f"Of the merges that were looked at in *{r['training']}*, {r['merges']} (each at its best scale and at the one furthest from it) "
        f"were scored by labels on {r['rows']} rows of each half: the rank correlation of fidelity with the mean score is "
        f"{r['rank_correlation']:.2f}. The closest by fidelity, {r['closest']} at {r['scale']:.2g}, scores {r['scores']:.1f}; the best of "
        f"them {r['best_scores']:.1f}."
        + "".join(f" By {k} in its place {v:.3f}." for k, v in r["rank_correlations"].items() if k != "fidelity")
    )


def _groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for arm in ARMS:
        for r in (r for r in rows if r["arm"] == arm):
            groups.setdefault((arm, r["method"]), []).append(r)
    return groups


def _table(rows: Sequence[dict[str, Any]]) -> str:
    floored = all("floor" in r for r in rows)
    kept = ("share kept, %", "of means") if floored else ("of own score, %",)
    lines = [
        f"| arm | alone | merge | scale | merged | {' | '.join(kept)} | KL | single |",
        "|---" * (7 + len(kept)) + "|",
    ]
    for (arm, method), group in _groups(rows).items():
        mean = {k: np.mean([r[k] for r in group]) for k in SHOWN if k in group[0]}
        shares = [100 * r["recovered" if floored else "of_own"] for r in group]
        spread = f" ({min(shares):.0f} to {max(shares):.0f})" if len(group) > 1 else ""
        of_means = f" | {100 * mean['share_of_means']:.0f}" if floored else ""
        lines.append(
            f"| `{arm}` | {mean['individual']:.1f} | {method} | {mean['scale']:.2f} | {mean['merged']:.1f} | "
            f"**{np.mean(shares):.0f}**{spread}{of_means} | {mean['general_kl']:.3f} | {mean['general_kl_alone']:.3f} |"
        )
    return "\n".join(lines)


def _tasks(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0]["tasks"])
    lines = ["| arm | | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]

    def line(head: str, group: Sequence[dict[str, Any]], key: str) -> str:
        return f"| {head} | " + " | ".join(f"{np.mean([r[key][n] for r in group]):.1f}" for n in names) + " |"

    for i, ((arm, method), group) in enumerate(_groups([r for r in rows if r["method"] == PRIMARY]).items()):
        assert method == PRIMARY
        lines += [line("bare base | floor", group, "floors")] if i == 0 and "floors" in group[0] else []
        lines += [line(f"`{arm}` | alone", group, "alone"), line("| merged", group, "tasks").replace("|  |", "| |", 1)]
    return "\n".join(lines)


def _tests(tests: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| difference of share kept | tasks | points | 95 % (t over tasks) | p | Holm | p, sign flips (smallest) |",
        "|---" * 7 + "|",
    ]
    for t in tests:
        holm = f"{t['p_holm']:.3f}" if "p_holm" in t else "" if t["tasks"] != "all" else "not registered"
        lines.append(
            f"| `{t['arm']}` - `{t['against']}` | {t['tasks']} ({t['n']}) | {100 * t['difference']:+.0f} | "
            f"{100 * t['low']:+.0f} to {100 * t['high']:+.0f} | {t['p']:.3f} | {holm} | {t['p_flips']:.3f} ({t['smallest_p_flips']:.3f}) |"
        )
    return "\n".join(lines)


def _curves(records: dict[str, Any]) -> str:
    lines = [
        "% of the arm's own gain, means over tasks and halves (50 rows of each). *rule*, *moments*: scales without labels.",
        "",
    ]
    lines += ["| arm | merge | rule | moments | recovered at scale |", "|---" * 5 + "|"]
    seeds = sorted({k.split("-")[1] for k in records if k.startswith("curves-")})
    for key in (f"curves-{s}-{a}" for s in seeds for a in ARMS):
        for method, x in records.get(key, {"methods": {}})["methods"].items():
            low, high = (np.array(records[key][k]).mean() for k in ("floor", "alone"))
            shown = [
                f"{s:.2g}: {100 * (np.mean(v) - low) / (high - low):.0f}"
                for s, v in zip(x["scales"], x["scores"], strict=True)
            ]
            lines.append(
                f"| `{key.split('-', 2)[2]}` | {method} | {x['rule']:.2f} | {x['moments']:.2f} | {', '.join(shown)} |"
            )
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="CONDITION=RUN")
    p.add_argument("--name", required=True)
    p.add_argument("--to", required=True, type=Path)
    p.add_argument("--study", default=MAIN, help="the recipe's name")
    p.add_argument("--tested", default="", help="seeds of the comparisons, such as 1,2")
    p.add_argument(
        "--floor",
        help="CONDITION=RUN of a study of the same base, prompts and rows: its floor, where this one has none",
    )
    a = p.parse_args()
    runs = {c: read(Path(folder)) for c, folder in (r.split("=", 1) for r in a.runs)}
    where, _, folder = (a.floor or "").partition("=")
    lent = read(Path(folder)) if a.floor else {}
    plain = next((lent[f"fixed-{s}-{PLAIN}"] for s in range(10) if f"fixed-{s}-{PLAIN}" in lent), None)
    rows = [r for c, records in runs.items() for r in rows_of(records, c, plain if c == where else None)]
    borrowed = plain is not None and not any(k.startswith("fixed-") and k.endswith(f"-{PLAIN}") for k in runs[where])
    references = [r for c, records in runs.items() for r in references_of(records, c)]
    tested = [int(s) for s in a.tested.split(",") if s]
    tests = tests_of(rows, tested, registered_study=a.study == MAIN)
    told = next(iter(runs.values()))
    existing = [r for c, records in runs.items() for r in existing_of(records, c)]
    whole = {
        "rows": rows, "tested": tested, "tests": tests, "expected": expected_of(rows, tested) if tested else [],
        "existing": existing, "existing_summary": summary_of(existing), "candidates": candidates_of(told),
        "references": references, "singles": singles_of(told),
    }  # fmt: skip
    if prices := [r for c, records in runs.items() for r in prices_of(records, c)]:
        whole["prices"] = prices
    if rounds := [r for c, records in runs.items() for r in rounds_of(records, c)]:
        whole |= {"rounds": rounds, "rounds_differences": rounds_differences(rounds)}
    (a.to / f"{a.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    if curves := packed(told):
        (a.to / f"scales-{a.name}.json").write_text(json.dumps(curves) + "\n")
    text = page(a.name, runs, rows, tests, references, tested, a.study, borrowed)
    (a.to / f"{a.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
