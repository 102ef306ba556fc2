"""The sections of benchmarks/text_page.py in Markdown, each from rows of text_account.py or text_steps.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from text_account import ARMS, PRIMARY
from text_steps import BY_RULE, ROUNDS, rounds_differences

SHOWN = ("individual", "scale", "merged", "recovered", "share_of_means", "general_kl", "general_kl_alone")
OF_JOINT = """ It takes as many steps as one adapter, each of 16 rows of every task, at the same rate: too few for the 77 intents
of BANKING77, so that it is no upper bound."""
EXISTING = """\
`benchmarks/text_auto.py`: 100 training prompts of each task, each answered by the task's own adapter; merges are compared with the
adapters at the positions named, and no label is read. *No text* is TSV-M at its default scale; *chosen* is the merge of the highest
fidelity among four methods with and without pico, over scales that grow at the edge; *weights learnt* multiplies its parts by
numbers per adapter and module, found in 100 steps. At all positions the choice by itself is not shown: by a fault of the script,
mended since, it was scored at its scale squared. Seconds on one H200 that scored other arms at the same time, writing the answers
left out. *Again*, *third* and *fourth* are seed 1 trained anew (trainings on a GPU differ), compared at written answers. A repair
was tried where a row says so: in *written* (100 prompts a task) and *third* (250) at 1e-3 for every factor, was kept in neither, and
the row is the merge that it began at; in *fourth* (250) at 3 % and at 1 % of each factor's root mean square, rising at first, and kept
at both. *Fitted on all* reads the 250 prompts too."""


def steps_of(reference: str) -> str:
    """The steps that a reference's name ends in, in words."""
    return f" for {reference.rpartition('_')[2]} steps" if "_" in reference else ""


def expected_table(found: Sequence[dict[str, Any]]) -> str:
    lines = ["| expected, share kept | came | of |", "|---|---|---|"]
    for r in found:
        verdict = "as expected" if r["came"] >= r["least"] else "**not so**"
        lines.append(f"| {r['expected']} | {r['came']:.2f} ({verdict}) | {r['least']:.2f} |")
    return "\n".join(lines)


def existing_section(found: Sequence[dict[str, Any]]) -> str:
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
    lines += [
        f"| {r['positions']}, seed {r['seed']}: {r['step']} | "
        + " | ".join(f"{100 * r['shares'][n]:.0f}" for n in names)
        + " |"
        for r in found
    ]
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


LADDERS_TEXT = """\
`text_arms.py --do nodata:SEED`: plain adapters, merged by methods that read nothing but them, over six scales on the rows that are there
to choose by (50 of each half). In percent of what the adapters gain alone. *Best* is chosen by labels, so it says what a method could keep
and not what it keeps; the difference is between best scales, t over tasks."""


def ladders_section(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each merge, beside the first of its record."""
    lines = [
        LADDERS_TEXT,
        "",
        "| adapters | merge | recovered at scale | by rule | best | less the first merge (95 %) |",
        "|---" * 6 + "|",
    ]
    for r in rows:
        shown = ", ".join(f"{s:.2g}: {100 * x:.0f}" for s, x in zip(r["scales"], r["recovered"], strict=True))
        d, edge = r["difference"], " (at the edge)" if r["edge"] else ""
        off = f"{100 * d['difference']:+.0f} ({100 * d['low']:+.0f} to {100 * d['high']:+.0f})" if d else ""
        lines.append(
            f"| `{r['arm']}`, {r['condition']}, seed {r['seed']} | {r['method']} | {shown} | {100 * r['at_rule']:.0f} | "
            f"**{100 * r['best']:.0f}**{edge} | {off} |"
        )
    return "\n".join(lines)


PRICES_TEXT = """\
`text_arms.py --do price:SEED --elsewhere STUDY.yaml:TASKS`: {tasks}, which no adapter here was trained on, told as in their own study,
and the perplexity of the general sentences. *Alone* is the mean over the arm's adapters, and the worst of them."""


def prices_section(rows: Sequence[dict[str, Any]]) -> str:
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


def rounds_section(rows: Sequence[dict[str, Any]]) -> str:
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


def candidates_sentence(r: dict[str, Any]) -> str:
    """How the merges that were looked at rank, in a sentence."""
    return (
        f"Of the merges that were looked at in *{r['training']}*, seed {r['seed']}, {r['merges']} (each at its best scale and at the one "
        f"furthest from it) were scored by labels on {r['rows']} rows of each half: the rank correlation of fidelity with the mean "
        f"score is {r['rank_correlation']:.2f}. The closest by fidelity, {r['closest']} at {r['scale']:.2g}, scores {r['scores']:.1f}; "
        f"the best of them {r['best_scores']:.1f}."
        + "".join(f" By {k} in its place {v:.3f}." for k, v in r["rank_correlations"].items() if k != "fidelity")
    )


def _groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for arm in ARMS:
        for r in (r for r in rows if r["arm"] == arm):
            groups.setdefault((arm, r["method"]), []).append(r)
    return groups


def fixed_table(rows: Sequence[dict[str, Any]]) -> str:
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


def task_table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0]["tasks"])
    lines = ["| arm | | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]

    def line(head: str, group: Sequence[dict[str, Any]], key: str) -> str:
        return f"| {head} | " + " | ".join(f"{np.mean([r[key][n] for r in group]):.1f}" for n in names) + " |"

    for i, ((arm, method), group) in enumerate(_groups([r for r in rows if r["method"] == PRIMARY]).items()):
        assert method == PRIMARY
        lines += [line("bare base | floor", group, "floors")] if i == 0 and "floors" in group[0] else []
        lines += [line(f"`{arm}` | alone", group, "alone"), line("| merged", group, "tasks").replace("|  |", "| |", 1)]
    return "\n".join(lines)


def tests_table(tests: Sequence[dict[str, Any]]) -> str:
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


def curves_section(records: dict[str, Any]) -> str:
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
