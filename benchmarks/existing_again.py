"""The figures of docs/results/existing*.json, made again from the records at hand, and their pages.

    python benchmarks/existing_again.py --results docs/results

Where a study did not measure one of the figures, it is taken from another study of the same base, tasks and kind of adapters, and said
so under `elsewhere`: the default at the prompt from existing-fresh.json, existing-fitted*.json and existing-texts*.json (of eleven
penalised adapters from scales-mpnet.json), joint training (one adapter of rank 8) from glue8-mpnet.json. What nothing holds stays
null. What `merge auto` gives since it fits and lets heads follow is in existing-fitted*.json and existing-texts*.json, of other seeds;
it takes the place of the files' own figures, which stay under `earlier`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import existing_page
import numpy as np
from existing import KEYS, interval, summary

FILES = {
    "existing.json": ("kaiming", 8),
    "existing-penalised.json": ("contrastive_penalised", 8),
    "existing-eleven.json": ("kaiming", 11),
    "existing-eleven-penalised.json": ("contrastive_penalised", 11),
    "existing-seeds-0-2.json": ("kaiming", 8),
}  # file -> arm and number of tasks, of which other measurements may stand in


def figure(by_seed: dict[str, float], of: str) -> dict[str, Any]:
    """Mean over seeds with its interval."""
    values = list(by_seed.values())
    return {"value": float(np.mean(values)), "interval": interval(values), "of": of}


def at_the_prompt(results: Path, arm: str) -> dict[str, Any]:
    """TSV-M at 0.7, a mean over the trainings of each seed."""
    seeds: dict[str, list[float]] = defaultdict(list)
    for row in json.loads((results / "existing-fresh.json").read_text())["rows"]:
        if row["arm"] == arm:
            seeds[str(row["seed"])].append(row["no_text"])
    if arm == "kaiming":
        for name in (*FITTED["existing.json"], *TEXTS["existing.json"]):
            for seed, r in json.loads((results / f"{name}.json").read_text())["seeds"].items():
                seeds[seed].append(r["rows"]["no text"]["recovered"])
    return figure({s: float(np.mean(v)) for s, v in seeds.items()}, f"seeds {', '.join(seeds)}")


def at_the_prompt_of_eleven(results: Path, arm: str) -> dict[str, Any]:
    """TSV-M at the scale of scales-mpnet.json that is nearest to 0.7; the rule was fitted on these adapters too."""
    seeds = {}
    for r in json.loads((results / "scales-mpnet.json").read_text()):
        if r["arm"] == arm and len(r["tasks"]) == 11:
            near = int(np.argmin(np.abs(np.array(r["scales"]) - 0.7)))
            low, high = np.mean(r["floor"]), np.mean(r["alone"])
            seeds[str(r["seed"])] = float((np.mean(r["scores"]["tsv"][near]) - low) / (high - low))
    return figure(seeds, f"scales-mpnet.json, seeds {', '.join(seeds)}, on which the scale was fitted")


def joint(results: Path) -> dict[str, Any]:
    """One adapter of rank 8 that was trained on all eight tasks."""
    rows = json.loads((results / "glue8-mpnet.json").read_text())["references"]
    seeds = {str(r["seed"]): r["recovered"] for r in rows if r["arm"] == "joint_r8"}
    return figure(seeds, f"[glue8-mpnet](glue8-mpnet.md), seeds {', '.join(seeds)}")


# What `merge auto` gives since it fits and lets heads follow: the files of benchmarks/fitted.py that hold it, and those whose repairs were
# all kept by the measure that decides now.
FITTED = {
    "existing.json": ("existing-fitted", "existing-fitted-again"),
    "existing-eleven.json": ("existing-fitted-eleven",),
    "existing-penalised.json": ("existing-fitted-penalised",),
}
UNLIKE = "existing-fitted"  # its repairs were kept by two measures
# The files of benchmarks/more_texts.py: heads and repairs that read 500 texts a task, beside those that read 100.
TEXTS = {
    "existing.json": ("existing-texts",),
    "existing-eleven.json": ("existing-texts-eleven", "existing-texts-eleven-again"),
    "existing-penalised.json": ("existing-texts-penalised",),
}
# Key -> its step in the files of `FITTED` and in those of `TEXTS`, where it was measured. A repair on 100 texts: kept by the divergence.
STEPS = {
    "recovered_no_text": ("no text", "no text"),
    "recovered_100_texts": ("fitted, heads", "fitted, heads: few texts"),
    "recovered_500_texts": (None, "fitted, heads"),
    "recovered_repaired_100_texts": ("fitted, repaired, heads", "repaired, heads: few texts, kept or not"),
    "recovered_repaired": (None, "repaired, heads"),
}
BY_LABELS = ("share_of_oracle", "rank_correlation")


def today(results: Path, name: str = "existing.json") -> dict[str, Any]:
    """What the default and `merge auto` give now of a file's kind of adapters, without a repair and with one; its choice beside labels'."""
    files = {f: json.loads((results / f"{f}.json").read_text())["seeds"] for f in FITTED.get(name, ())}
    found = {}
    texts = {f: json.loads((results / f"{f}.json").read_text())["seeds"] for f in TEXTS[name]} if files else {}
    for key, steps in STEPS.items():
        mine = [
            (f, seeds, step)
            for step, several in zip(steps, (files, texts), strict=True)
            for f, seeds in several.items()
            if step is not None and (key != "recovered_repaired_100_texts" or f != UNLIKE)
            if any(step in r["rows"] for r in seeds.values())
        ]
        by_seed = {s: r["rows"][step]["recovered"] for _, seeds, step in mine for s, r in seeds.items()}
        found[key] = figure(by_seed, _of({f: seeds for f, seeds, _ in mine})) if by_seed else None
    for key in BY_LABELS:
        mine = {f: {s: r for s, r in seeds.items() if "labels" in r} for f, seeds in files.items()}
        by_seed = {s: r["labels"][key] for seeds in mine.values() for s, r in seeds.items()}
        found[key] = figure(by_seed, _of({f: seeds for f, seeds in mine.items() if seeds})) if by_seed else None
    if (
        name != "existing.json" and files
    ):  # the default at the prompt is TSV-M at its scale; of eight plain adapters there are more seeds
        found["default_at_prompt"] = found["recovered_no_text"]
    return {k: v for k, v in found.items() if v is not None}


def _of(files: dict[str, Any]) -> str:
    return "; ".join(f"[{f}]({f}.md), seeds {', '.join(seeds)}" for f, seeds in files.items())


def main() -> None:
    """Write the files and their pages anew."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", required=True, type=Path)
    a = p.parse_args()
    for name, (arm, count) in FILES.items():
        file = a.results / name
        report = json.loads(file.read_text())
        figures = summary(report["seeds"])
        if count == 8:
            others = {"default_at_prompt": at_the_prompt(a.results, arm), "recovered_joint": joint(a.results)}
        else:
            others = {"default_at_prompt": at_the_prompt_of_eleven(a.results, arm)}
        others = {k: v for k, v in others.items() if figures[k] is None}
        others |= today(a.results, name)
        earlier = {
            k: {"value": figures[k], "interval": figures["intervals"].get(k)}
            for k in others
            if figures.get(k) is not None
        }
        figures["intervals"] = {k: v for k, v in figures["intervals"].items() if k not in earlier}
        rest = {k: v for k, v in report.items() if k not in figures and k not in ("elsewhere", "earlier")}
        values = {k: v["value"] for k, v in others.items()}
        report = {**figures, **values, "elsewhere": others, **({"earlier": earlier} if earlier else {}), **rest}
        file.write_text(json.dumps(report, indent=1) + "\n")
        (a.results / f"{file.stem}.md").write_text(existing_page.page(report, name))
        print(name, {k: report[k] for k in (*KEYS, "share_of_oracle", "rank_correlation")})


if __name__ == "__main__":
    main()
