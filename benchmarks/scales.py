"""What the default scale of a merge costs against the best scale chosen by labels: every archived study, and merges of 2 to 11 adapters.

    python benchmarks/scales.py --results docs/results
    python benchmarks/scales.py --results docs/results --pack RUN/scales-kaiming.json RUN/scales-contrastive_penalised.json

The second packs what `benchmarks/scales_measure.py` measured into RESULTS/scales-mpnet.json. The first reads that file and every
RESULTS/*.tar.xz, and writes RESULTS/scales.json (`rows` of {source, base, tasks, arm, method, default, best, lost, recovered}; what
two archives hold alike stands there once, with the second's name in `also`) and RESULTS/scales.md (`scales_page.py`). The best scale
is chosen on one half of the validation rows; it and the default are both read on the other half, halves swapped and averaged, the
default between two scored scales by linear interpolation over log scale; `by_length` of {method, rows, bases, number, length}
(`scales_length.py`). `lost` is in points of recovered, of the study's
reference; it can be negative, where the labels of one half chose worse for the other than the rule. `length` is the Frobenius norm
of an adapter's update over all its modules, where the archive holds it.
"""

from __future__ import annotations

import argparse
import json
import math
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scales_page
from scales_length import by_length
from scales_page import OWN

from plait.evaluation.splits import HALVES
from plait.merging.scales import REACH, reach_of, scale_by_rule
from plait.report.table import reference
from plait.runs.folder import layout_of_folder
from plait.runs.units import ALONE, FOLDS, MERGE
from plait.runs.waves import all_units, result


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
                length = result(layout, replace(unit, stage=ALONE, merge=""))["delta_norm"]
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
                        "length": float(np.mean(list(length.values()))),
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
    name, _, calibration = method.removesuffix(OWN).partition(" + ")
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
        if "length" in cell[0]:
            row["length"] = float(np.mean([c["length"] for c in cell]))
        if "reach" in cell[0]:
            name, _, calibration = method.removesuffix(OWN).partition(" + ")
            reach = REACH if method.endswith(OWN) else reach_of(name, calibration or None)
            for kind in cell[0]["reach"]:
                by = float(np.mean([read(c["curve"], reach * c["reach"][kind]) for c in cell]))
                row[f"lost_by_{kind}_moments"] = 100 * (chosen - by)
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return _once(rows)


def _once(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was scored once and archived twice (a study that goes on from another's trainings), once."""
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        same = first.setdefault(tuple(v for k, v in row.items() if k != "source"), row)
        if same is not row:
            same["also"] = [*same.get("also", ()), row["source"]]
    return list(first.values())


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
    archived = list(curves_of_archives(a.results))
    rows, tried = rows_of([*archived, *curves_measured(file), *written]), by_length(archived)
    (a.results / "scales.json").write_text(
        json.dumps({"reach": REACH, "rows": rows, "by_length": tried}, indent=1) + "\n"
    )
    text = scales_page.page(rows, tried)
    (a.results / "scales.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
