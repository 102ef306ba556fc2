"""docs/results/scales.md, written from the rows that `scales.py` makes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from plait.merging.scales import REACH, REACHES, RULES

FIRST_TIER = (
    "task_arithmetic",
    "ties",
    "dare_ties",
    "knots",
    "tsv",
    "iso_c",
    "core_space",
    "regmean",
    "task_arithmetic + pico",
)
OWN = " (own moments)"
LATER = ("arms-mpnet",)  # archives that came after the constants
UNSEEN = "qwen15"  # the base that came after the rules
AIM = 2.0  # points that a default may lose
PLAIN = ("kaiming", "gaussian")


def _mean(rows: Sequence[dict[str, Any]], key: str) -> str:
    values = [r[key] for r in rows if key in r]
    return f"{np.mean(values):.1f}" if values else ""


_INTRODUCTION = """# The scale of a merge, chosen without labels

`python benchmarks/scales.py --results docs/results` makes this page from the archives of the studies, from `scales-mpnet.json`
(`benchmarks/scales_measure.py`: MPNet, 2 to 11 of eleven tasks, plain adapters and `contrastive_penalised` ones) and from
`scales-text-qwen15.json` (`benchmarks/text_page.py`: a decoder of 1.5 B, nine tasks whose answers are written, five arms, one seed).

Points of *recovered* lost by the default scale against the scale that labels of the other half chose; negative where the rule did
better. *at 1* is what the same merge loses at scale 1. *moments*: the scale from second moments of the base's activations, one factor
({reach:g}; for `regmean` {regmean:g}) for all methods; plait uses it where statistics are given, but for `iso_c`, where the rule
is nearer. The constants of the rules were fitted on the archives and on MPNet: two numbers a method over {fitted} rows; the table
has the later rows of `arms-mpnet` too. **The decoder of 1.5 B came afterwards**; its rows stand by themselves below. Two things were
changed by it: RegMean's scale, which always has statistics, is read off them with a factor of its own (the rule loses 23 points
there, the moments 2.5; on MPNet 2.9 and 2.3), and
DARE-TIES has 1, whatever the number (by 1.1 T^0.1 plain adapters lost 5.0 points on MPNet and 20.8 on the decoder; with 1 they lose
0.1 and 7.0). One scale cannot serve plain adapters and penalised ones alike (which bear more), and that is most of what task
arithmetic loses by its rule; moments tell them apart.

| method | rule | rows | lost | of plain adapters | worst row | at 1 | moments | rule, same rows |
|---|---|---|---|---|---|---|---|---|"""


def page(rows: Sequence[dict[str, Any]], tried: Sequence[dict[str, Any]]) -> str:
    """The table a reader wants: each method, what its default costs by number of tasks, and the worst cells."""
    lines = [
        _INTRODUCTION.format(
            reach=REACH,
            regmean=REACHES["regmean"],
            fitted=sum(r["base"] != UNSEEN and r["source"] not in LATER for r in rows),
        )
    ]
    for method in sorted({r["method"] for r in rows}, key=lambda m: (m not in FIRST_TIER, m)):
        mine = [r for r in rows if r["method"] == method and r["base"] != UNSEEN]
        name, _, calibration = method.removesuffix(OWN).partition(" + ")
        c, p = RULES.get((name, calibration or None), (1.0, 0.0))
        worst = max(mine, key=lambda r: r["lost"])
        measured = [r for r in mine if "lost_by_base_moments" in r]
        plain = [r for r in mine if r["arm"] in PLAIN]
        lines.append(
            f"| {method} | {c:g}{f' T^{p:g}' if p else ''} | {len(mine)} | {_mean(mine, 'lost')} | {_mean(plain, 'lost')} | "
            f"{worst['lost']:.0f} ({worst['source']}, {worst['arm']}) | {_mean(mine, 'lost_at_1')} | "
            f"{_mean(measured, 'lost_by_base_moments')} | {_mean(measured, 'lost')} |"
        )
    return "\n".join([*lines, "", *_aim(rows), "", *_by_length(tried), "", *_unseen(rows), "", *_by_count(rows), ""])


def _aim(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How often each method of the first tier loses no more than it should, and the three worst rows with what they come from."""
    tier = [r for r in rows if r["method"] in FIRST_TIER]
    lines = [
        f"## The aim: at most {AIM:g} points lost by every method of the first tier",
        "",
        "All archives and bases, the decoder among them; a merge that two archives hold counts once.",
        "",
        "| method | rows | lost: mean | median | at most 2 | of plain adapters: rows | mean | median | at most 2 |",
        "|---" * 9 + "|",
    ]
    for method in FIRST_TIER:
        cells = []
        for mine in (
            [r["lost"] for r in tier if r["method"] == method],
            [r["lost"] for r in tier if r["method"] == method and r["arm"] in PLAIN],
        ):
            within = 100 * np.mean([v <= AIM for v in mine])
            cells += [f"{len(mine)}", f"{np.mean(mine):.1f}", f"{median(mine):.1f}", f"{within:.0f} %"]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    met = [m for m in FIRST_TIER if np.mean([r["lost"] for r in tier if r["method"] == m]) <= AIM]
    half = [m for m in FIRST_TIER if median(r["lost"] for r in tier if r["method"] == m) <= AIM]
    plain = [m for m in FIRST_TIER if median(r["lost"] for r in tier if r["method"] == m and r["arm"] in PLAIN) <= AIM]
    lines += [
        "",
        f"**The aim is {'met on average by ' + ', '.join(met) if met else 'missed: on average no method meets it'}**; by the median row "
        f"{', '.join(half) or 'none'} does, and with plain adapters alone {', '.join(plain) or 'none'}.",
        "",
        "The three worst rows of the first tier, beside the plain adapters (`kaiming`) of the same study and method. *length*: "
        "Frobenius norm of an adapter's update over all its modules, mean over tasks and seeds.",
        "",
        "| row | default | best | best of `kaiming` | length | length of `kaiming` | recovered at the best | lost | by moments |",
        "|---" * 9 + "|",
    ]
    for r in sorted(tier, key=lambda r: -r["lost"])[:3]:
        peers = [p for p in rows if p["arm"] == "kaiming" and _beside(p, r)]
        other = peers[0] if peers else {}
        numbers = (
            _digits(r.get("default"), 2), _digits(r.get("best"), 2), _digits(other.get("best"), 2), _digits(r.get("length"), 1),
            _digits(other.get("length"), 1), _digits(100 * r["recovered"], 0), _digits(r.get("lost"), 1),
            _digits(r.get("lost_by_base_moments"), 1),
        )  # fmt: skip
        lines.append(
            f"| {r['method']}, `{r['arm']}` ({r['source']}, {r['tasks']} tasks) | " + " | ".join(numbers) + " |"
        )
    return [*lines, "", *_why(rows)]


def _digits(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _beside(plain: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether two rows are of one study, number of tasks and method."""
    same = all(plain[k] == row[k] for k in ("tasks", "method"))
    return same and row["source"] in (plain["source"], *plain.get("also", ()))


def _why(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What best scales follow from arm to arm: the length of the update for Iso-C, the place of the update for the sum."""
    sources = ("glue8-mpnet", "glue8-minilm", "text3-smollm2", "glue8-minilm-beta")
    methods = ("iso_c", "tsv", "task_arithmetic", "task_arithmetic + pico")
    table = [
        "| method | " + " | ".join(sources) + " |",
        "|---" * (len(sources) + 1) + "|",
        *("| " + " | ".join([m, *(_followed(rows, m, s) for s in sources)]) + " |" for m in methods),
    ]
    best = {
        (r["tasks"], r["arm"]): r["best"]
        for r in rows
        if (r["source"], r["method"]) == ("scales-mpnet", "task_arithmetic")
    }
    ratios = [best[n, "contrastive_penalised"] / v for (n, arm), v in best.items() if arm == "kaiming"]
    return [
        "- **Iso-C and `gaussian`.** PEFT's `gaussian` start draws A larger than its default start does, and the trained "
        "updates are three times as long. Iso-C gives every direction the mean singular value, which grows with them; its best "
        "scale falls as updates grow, and a rule by method and number cannot know. Correlation over arms of the logarithms of "
        "best scale and length:",
        "",
        *table,
        "",
        f"- **The sum and penalised adapters.** On MPNet they bear {np.min(ratios):.1f} to {np.max(ratios):.1f} times the scale "
        "of plain ones, by number of tasks; at six the rule is below both, and the curve is steep. Length says little of "
        "it for the sum (first three columns): what counts is where an update lies, on its own task's inputs or on all. Second "
        "moments see that, where they are given (*by moments*).",
        "- **Pico and the strongest penalty.** A penalty of 30 (`contrastive_penalised` has 1) leaves an update an eighth as "
        "long as a plain one; in that study, whose arms differ by the penalty, length tells the best scale (last column). The "
        "archives hold no moments, so the row cannot be tried by them.",
        "",
        "For sums, TIES and RegMean of adapters that are not plain ones give `--stats` (column *moments* of the first table), "
        "or texts.",
    ]


def _by_length(tried: Sequence[dict[str, Any]]) -> list[str]:
    better = ", ".join(r["method"] for r in tried if r["length"] < r["number"] - 0.5)
    worse = sum(r["length"] > r["number"] + 0.5 for r in tried)
    return [
        "## Would it help to know how long the updates are?",
        "",
        "Not on a base that a rule was not fitted on. c T^p with the rule's p, and c T^p L^q with L the length of an adapter's update: "
        f"c and q fitted on the other bases of the archives ({max(r['bases'] for r in tried)} in all) by points lost, tried on the one "
        f"left out. With the length {worse} of {len(tried)} methods lose at least half a point more, "
        f"and at least half a point less: {better or 'none'}. Lengths of one base say little of another's.",
        "",
        "| method | rows | lost by c T^p | lost by c T^p L^q |",
        "|---|---|---|---|",
        *(f"| {r['method']} | {r['rows']} | {r['number']:.1f} | {r['length']:.1f} |" for r in tried),
    ]


def _followed(rows: Sequence[dict[str, Any]], method: str, source: str) -> str:
    """How best scales follow lengths over the arms of one study."""
    mine = [r for r in rows if source in (r["source"], *r.get("also", ())) and r["method"] == method and "length" in r]
    if len(mine) < 3:
        return ""
    x, y = (np.log([r[k] for r in mine]) for k in ("length", "best"))
    return f"{np.corrcoef(x, y)[0, 1]:+.2f} (slope {np.polyfit(x, y, 1)[0]:+.2f}, {len(mine)} arms)"


def _unseen(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["## A base that the rules had not seen: a decoder of 1.5 B, nine written tasks, one seed", ""]
    lines += [
        "| method | arm | rule | best | lost by the rule | at 1 | by moments | recovered at the best |",
        "|---" * 8 + "|",
    ]
    mine = [r for r in rows if r["base"] == UNSEEN]
    for r in sorted(mine, key=lambda r: (r["method"] not in FIRST_TIER, r["method"], r["arm"] != "kaiming", r["arm"])):
        lines.append(
            f"| {r['method']} | {r['arm']} | {r['default']:.2g} | {r['best']:.2g} | {r['lost']:.1f} | {r['lost_at_1']:.1f} | "
            f"{r['lost_by_base_moments']:.1f} | {100 * r['recovered']:.0f} |"
        )
    return lines


def _by_count(rows: Sequence[dict[str, Any]]) -> list[str]:
    counts = sorted({r["tasks"] for r in rows if r["source"] == "scales-mpnet"})
    lines = [
        "## Recovered at the default scale, plain adapters on MPNet",
        "",
        "| method | " + " | ".join(f"{n} tasks" for n in counts) + " |",
    ]
    lines.append("|---" * (len(counts) + 1) + "|")
    mine = [r for r in rows if r["source"] == "scales-mpnet" and r["arm"] == "kaiming"]
    for method in sorted({r["method"] for r in mine}, key=lambda m: (m not in FIRST_TIER, m)):
        cells = {r["tasks"]: f"{100 * r['recovered'] - r['lost']:.0f}" for r in mine if r["method"] == method}
        lines.append(f"| {method} | " + " | ".join(cells.get(n, "") for n in counts) + " |")
    return lines
