"""What the default scale of a merge costs against the best scale chosen by labels: every archived study, and merges of 2 to 11 adapters.

    python benchmarks/scales.py --results docs/results
    python benchmarks/scales.py --results docs/results --pack RUN/scales-kaiming.json RUN/scales-contrastive_penalised.json

The second packs what `benchmarks/scales_measure.py` measured into RESULTS/scales-mpnet.json. The first reads that file and every
RESULTS/*.tar.xz, and writes RESULTS/scales.json (`rows` of {source, base, tasks, arm, method, default, best, lost, recovered}) and
RESULTS/scales.md. The best scale is chosen on one half of the validation rows; it and the default are both read on the other half, halves
swapped and averaged, the default between two scored scales by linear interpolation over log scale. `lost` is in points of
recovered, of the study's reference; it can be negative, where the labels of one half chose worse for the other than the rule.
"""

from __future__ import annotations

import argparse
import json
import math
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plait.evaluation.splits import HALVES
from plait.merging.scales import REACH, REACHES, RULES, reach_of, scale_by_rule
from plait.report.table import reference
from plait.runs.folder import layout_of_folder
from plait.runs.units import FOLDS, MERGE
from plait.runs.waves import all_units, result

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
_OWN = " (own moments)"
UNSEEN = "qwen15"  # the base that came after the rules


def read(curve: Sequence[tuple[float, float]], scale: float) -> float:
    """A score at a scale between the scored ones; at the nearest of them outside."""
    return float(np.interp(math.log(scale), [math.log(s) for s, _ in curve], [v for _, v in curve]))


def curves_of_archives(results: Path) -> Iterator[dict[str, Any]]:
    """One record for each merge of each study, seed and half: recovered over scales, and the scale the other half chose."""
    for archive in sorted(results.glob("*.tar.xz")):
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            layout = layout_of_folder(next(Path(folder).iterdir()))
            specs = {m.name: m for m in layout.recipe.merge_specs}
            ends: dict[int, tuple[float, float]] = {}
            for unit in dict.fromkeys(
                u for u in all_units(layout) if u.stage == MERGE and u.split == FOLDS and not u.variant
            ):
                if unit.seed not in ends:
                    ends[unit.seed] = reference(layout, unit.seed).over(layout.tasks)
                low, high = ends[unit.seed]
                scored, spec = result(layout, unit), specs[unit.merge]
                method = (spec.method or spec.name) + (f" + {spec.calibrate}" if spec.calibrate else "")
                if spec.options and method != "dare_linear":  # an option of its own is another method
                    continue
                for half in HALVES:
                    points = [
                        (g["scale"], float(np.mean(list(g["tasks"].values()))))
                        for g in scored["grid"]
                        if g["part"] == half
                    ]
                    yield {
                        "source": layout.recipe.name, "base": Path(layout.recipe.base.model).name, "tasks": len(layout.recipe.tasks),
                        "arm": unit.arm, "method": method, "best": scored["halves"][half]["scale"],
                        "curve": [(s, (v - low) / (high - low)) for s, v in sorted(points)],
                    }  # fmt: skip


def curves_measured(file: Path) -> Iterator[dict[str, Any]]:
    """The same of the merges of 2 to 11 adapters, with the scale that moments say at REACH 1."""
    for r in json.loads(file.read_text()):
        low, high = np.mean(r["floor"]), np.mean(r["alone"])
        for method, scores in r["scores"].items():
            table = np.array(scores)  # (scales, halves)
            for half in (0, 1):
                yield {
                    "source": "scales-mpnet", "base": "all-mpnet-base-v2", "tasks": len(r["tasks"]), "arm": r["arm"],
                    "method": method, "best": r["scales"][int(np.argmax(table[:, 1 - half]))],
                    "reach": {kind: by[method] for kind, by in r["reach"].items()},
                    "curve": [(s, float((v - low) / (high - low))) for s, v in zip(r["scales"], table[:, half], strict=True)],
                }  # fmt: skip


def curves_of_text(file: Path) -> Iterator[dict[str, Any]]:
    """The same of merges on a decoder that writes its answers (benchmarks/text_page.py), each with a ladder of its own."""
    for r in json.loads(file.read_text()):
        low, high = np.mean(r["floor"]), np.mean(r["alone"])
        for method, x in r["methods"].items():
            table = np.array(x["scores"])  # (scales, halves)
            for half in (0, 1):
                yield {
                    "source": file.stem, "base": file.stem.rpartition("-")[2], "tasks": len(r["tasks"]), "arm": r["arm"],
                    "method": method, "best": x["scales"][int(np.argmax(table[:, 1 - half]))],
                    "reach": {"base": x["moments"] / REACH},
                    "curve": [(s, float((v - low) / (high - low))) for s, v in zip(x["scales"], table[:, half], strict=True)],
                }  # fmt: skip


def rule_of(method: str, count: int) -> float:
    """The default scale without statistics."""
    name, _, calibration = method.removesuffix(_OWN).partition(" + ")
    return scale_by_rule(name, calibration or None, (1.0,) * count).value


def rows_of(curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each source, number of tasks, arm and method, over seeds, subsets and halves."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for c in curves:
        cells[c["source"], c["base"], c["tasks"], c["arm"], c["method"]].append(c)
    rows = []
    for (source, base, tasks, arm, method), cell in sorted(cells.items()):
        scale = rule_of(method, tasks)
        chosen = float(np.mean([read(c["curve"], c["best"]) for c in cell]))
        row = {
            "source": source, "base": base, "tasks": tasks, "arm": arm, "method": method, "default": scale,
            "best": float(math.exp(np.mean([math.log(c["best"]) for c in cell]))), "recovered": chosen,
            "lost": 100 * (chosen - float(np.mean([read(c["curve"], scale) for c in cell]))),
            "lost_at_1": 100 * (chosen - float(np.mean([read(c["curve"], 1.0) for c in cell]))), "n": len(cell),
        }  # fmt: skip
        if "reach" in cell[0]:
            name, _, calibration = method.removesuffix(_OWN).partition(" + ")
            reach = REACH if method.endswith(_OWN) else reach_of(name, calibration or None)
            for kind in cell[0]["reach"]:
                by = float(np.mean([read(c["curve"], reach * c["reach"][kind]) for c in cell]))
                row[f"lost_by_{kind}_moments"] = 100 * (chosen - by)
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return rows


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
is nearer. The constants of the rules were fitted on the archives and on MPNet: two numbers a method over {fitted} rows. **The decoder
of 1.5 B came afterwards**; its rows stand by themselves below. Two things were changed by it: RegMean's scale, which always has
statistics, is read off them with a factor of its own (the rule loses 23 points there, the moments 2.5; on MPNet 2.9 and 2.3), and
DARE-TIES has 1, whatever the number (by 1.1 T^0.1 plain adapters lost 5.0 points on MPNet and 20.8 on the decoder; with 1 they lose
0.1 and 7.0). One scale cannot serve plain adapters and penalised ones alike (which bear twice as much), and that is most of what task
arithmetic loses by its rule; moments tell them apart.

| method | rule | rows | lost | of plain adapters | worst row | at 1 | moments | rule, same rows |
|---|---|---|---|---|---|---|---|---|"""


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The table a reader wants: each method, what its default costs by number of tasks, and the worst cells."""
    lines = [
        _INTRODUCTION.format(reach=REACH, regmean=REACHES["regmean"], fitted=sum(r["base"] != UNSEEN for r in rows))
    ]
    for method in sorted({r["method"] for r in rows}, key=lambda m: (m not in FIRST_TIER, m)):
        mine = [r for r in rows if r["method"] == method and r["base"] != UNSEEN]
        name, _, calibration = method.removesuffix(_OWN).partition(" + ")
        c, p = RULES.get((name, calibration or None), (1.0, 0.0))
        worst = max(mine, key=lambda r: r["lost"])
        measured = [r for r in mine if "lost_by_base_moments" in r]
        plain = [r for r in mine if r["arm"] in ("kaiming", "gaussian")]
        lines.append(
            f"| {method} | {c:g}{f' T^{p:g}' if p else ''} | {len(mine)} | {_mean(mine, 'lost')} | {_mean(plain, 'lost')} | "
            f"{worst['lost']:.0f} ({worst['source']}, {worst['arm']}) | {_mean(mine, 'lost_at_1')} | "
            f"{_mean(measured, 'lost_by_base_moments')} | {_mean(measured, 'lost')} |"
        )
    return "\n".join([*lines, "", *_unseen(rows), "", *_by_count(rows), ""])


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


def packed(files: Sequence[Path]) -> list[dict[str, Any]]:
    """What scales_measure.py wrote, without the scores of single tasks."""
    found = []
    for file in files:
        for r in json.loads(file.read_text()):
            scores, names = np.array(r["scores"]).mean(-1).round(2), r["methods"]
            reach = {
                kind: {
                    m: round(math.sqrt(len(e) / sum(c / a for a, _, c in e.values())), 4)
                    for m, e in zip(names, by, strict=True)
                }
                for kind, by in r["energies"].items()
            }
            ends = {k: np.array(r[k]).mean(1).round(2).tolist() for k in ("floor", "alone")}
            found.append({
                "arm": r["arm"], "seed": r["seed"], "tasks": r["tasks"], "scales": [round(s, 6) for s in r["scales"]], **ends,
                "scores": dict(zip(names, scores.tolist(), strict=True)), "reach": reach,
            })  # fmt: skip
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", required=True, type=Path)
    p.add_argument("--pack", nargs="*", type=Path, default=[])
    a = p.parse_args()
    file = a.results / "scales-mpnet.json"
    if a.pack:
        file.write_text(json.dumps(packed(a.pack)) + "\n")
    written = [c for f in sorted(a.results.glob("scales-text-*.json")) for c in curves_of_text(f)]
    rows = rows_of([*curves_of_archives(a.results), *curves_measured(file), *written])
    (a.results / "scales.json").write_text(json.dumps({"reach": REACH, "rows": rows}, indent=1) + "\n")
    (a.results / "scales.md").write_text(page(rows))
    print(page(rows))


if __name__ == "__main__":
    main()
