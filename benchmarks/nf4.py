"""What four bits take from merged adapters of QLoRA, way by way of serving them; without labels.

    plait run RECIPE --out RUN        # with base.four_bits: nf4 (the recipe stands in docs/results/nf4.md)
    python benchmarks/nf4.py --base MODEL --data GLUE --adapters RUN/adapters/kaiming --seeds 0,1,2 --out docs/results

    python benchmarks/nf4.py --trained full --name nf4-mpnet --base MPNET --data GLUE --adapters RUN/adapters/kaiming --seeds 8,9
        --tasks cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte --out docs/results

`--adapters` holds seed-S/TASK folders as `plait run` writes them. With `--trained full` they were trained on the base in full
precision, which is then what every way is compared with: what four bits take from a merge of plain adapters. The merge is the default
of `plait merge` (TSV-M at 0.7), for which no text is read; what is left of each adapter is measured on --fresh validation texts of
each task.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from intervals import t_interval
from judging import task_of

from plait.adapters.peft_format import read_adapter
from plait.border.records import to_json
from plait.disk.store import versions
from plait.fidelity.serving import measure
from plait.merging import merge
from plait.model.base import BaseModel
from plait.tasks import load_examples


def one_seed(base: BaseModel, folder: Path, names: list[str], a: argparse.Namespace) -> dict[str, Any]:
    """Adapters of one seed, merged, and every way of serving them."""
    root, started = Path(a.data), time.process_time()
    adapters = [replace(read_adapter(folder / n, name=n), base=a.base) for n in names]
    fresh = {}
    for name in names:
        rows = load_examples(task_of(name, root), "validation", root=root)
        fresh[name] = rows.take(np.arange(a.fresh)).texts
    merged = replace(merge(adapters).adapter, name="merged")
    measured = measure(adapters, merged, base, fresh, max_length=a.length, on_progress=print)
    return {"ways": to_json(measured)["ways"], "cpu_seconds": time.process_time() - started}


def values(seeds: dict[str, Any], way: int, which: str, key: str) -> np.ndarray:
    """One number of each seed and task, in order."""
    return np.array(
        [t[key] for s in sorted(seeds) for t in sorted(seeds[s]["ways"][way][which]["tasks"], key=lambda t: t["task"])]
    )


def summary(seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """Followed and agreement of every way, and how far it is from the first, with the 95 % t interval over seeds and tasks."""
    rows = []
    for i, way in enumerate(next(iter(seeds.values()))["ways"]):
        row: dict[str, Any] = {"way": way["way"]}
        for which in ("merged", "alone"):
            here, first = (values(seeds, w, which, "followed") for w in (i, 0))
            off = t_interval(here - first)
            row[which] = {
                "followed": float(here.mean()),
                "agreement": float(values(seeds, i, which, "agreement").mean()),
                "difference": off.mean,
                "interval": [off.low, off.high],
            }
        rows.append(row)
    return rows


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "data", "adapters", "out"):
        ap.add_argument(f"--{name}", required=True)
    ap.add_argument("--seeds", default="0,1,2")
    ap.add_argument("--tasks", default="sst2,mrpc,qnli")
    ap.add_argument("--trained", choices=("nf4", "full"), default="nf4", help="how the base was held in training")
    ap.add_argument("--name", default="nf4", help="of the file of results")
    ap.add_argument("--device", default="cpu")
    for name, value in (("fresh", 80), ("length", 48)):
        ap.add_argument(f"--{name}", type=int, default=value)
    a = ap.parse_args()
    out, names = Path(a.out) / f"{a.name}.json", a.tasks.split(",")
    seeds: dict[str, Any] = json.loads(out.read_text())["seeds"] if out.exists() else {}
    for seed in a.seeds.split(","):
        if seed in seeds:
            continue
        base = BaseModel(a.base, device=a.device, four_bits="nf4" if a.trained == "nf4" else None)
        seeds[seed] = one_seed(base, Path(a.adapters) / f"seed-{seed}", names, a)
        settings = {k: getattr(a, k) for k in ("tasks", "fresh", "length", "trained", "device")}
        document = {
            "command": "benchmarks/nf4.py",
            "settings": settings,
            "versions": versions(),
            "rows": summary(seeds),
            "seeds": seeds,
        }
        out.write_text(json.dumps(document, indent=1) + "\n")
        for row in summary(seeds):
            print(
                row["way"],
                *(f"{w} {row[w]['followed']:.3f} ({row[w]['difference']:+.3f})" for w in ("merged", "alone")),
                flush=True,
            )


if __name__ == "__main__":
    main()
