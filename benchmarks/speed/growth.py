"""How merging grows with the number of adapters, their rank and the width of the layers: CPU seconds of merges in memory, as curves.

    PYTHONPATH=src:. OMP_NUM_THREADS=1 python -P -m benchmarks.speed.growth --out docs/results/growth

Random adapters of four square modules, held in memory; nothing is read, written or verified. Each point is the faster of two merges.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.choosing.candidates import METHODS as TRIED
from plait.choosing.factors_only import choose_by_factors
from plait.merging.planning import plan_merge

_BOTTOM = """torch {torch}, one thread, load average {load} on {cores} cores. A load above the cores is other work on the machine: CPU
seconds are then longer, since others use its caches too, and exponents less so. `ties` and `dare_ties` run loops that Numba compiles
where all tasks together have 2^29 entries or more, and passes of torch below: an exponent of a step that crosses that is too small.

At rank 128 the ranks of eight adapters add up to the width. There `ties` and `dare_ties` write their result as it is, where they
otherwise cut it, and take less; `tsv`, `iso_c` and `core_space` decompose a square matrix and take several times more than twice."""
MODULES = 4
METHODS = ("linear", "svd", "tsv", "iso_c", "core_space", "knots", "ties", "dare_ties", "pico", "advise")
# Axis -> its values, and (adapters, rank, width) at each.
AXES = {
    "adapters": [(n, (n, 8, 1024)) for n in (2, 4, 8, 16, 32, 64)],
    "rank": [(r, (8, r, 1024)) for r in (8, 16, 32, 64, 128)],
    "width": [(w, (8, 16, w)) for w in (512, 1024, 2048, 4096)],
}


def adapters(count: int, rank: int, width: int) -> list[Adapter]:
    """Random adapters of square modules."""
    made = []
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        factors = {
            f"layer.{i}": LoraFactors(
                torch.randn(rank, width, generator=g), torch.randn(width, rank, generator=g) / 100
            )
            for i in range(MODULES)
        }
        made.append(Adapter(f"task{seed}", "base", factors))
    return made


def seconds(method: str, inputs: Sequence[Adapter], rank: int, repeats: int = 2) -> float:
    """CPU seconds of one merge."""
    best = math.inf
    for _ in range(repeats):
        started = time.process_time()
        if method == "advise":
            choose_by_factors(inputs, TRIED, (0.25, 0.6, 1.3))
        elif method == "pico":
            plan_merge(inputs, "task_arithmetic", calibrate="pico").run("merged")
        else:
            plan_merge(inputs, method, rank=rank if method == "svd" else None).run("merged")
        best = min(best, time.process_time() - started)
    return best


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Of the last step: 1 where twice as much takes twice as long; NaN where there is no step."""
    if len(points) < 2:
        return math.nan
    (x, a), (y, b) = points[-2:]
    return math.log(b / a) / math.log(y / x)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="without .json, .md and .svg")
    p.add_argument(
        "--largest",
        type=int,
        default=1 << 30,
        help="leave out points of more numbers in all factors, to try the script",
    )
    p.add_argument(
        "--axes", default=",".join(AXES), help="what is measured now; the others stay as an earlier run wrote them"
    )
    a = p.parse_args()
    torch.set_num_threads(1)
    earlier = a.out.with_suffix(".json")
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {axis: {} for axis in AXES}
    if earlier.exists():
        curves |= json.loads(earlier.read_text())["curves"]
    for axis, values in AXES.items():
        if axis not in a.axes.split(","):
            continue
        curves[axis] = {m: [] for m in METHODS}
        for value, (count, rank, width) in values:
            if count * rank * width > a.largest:
                continue
            inputs = adapters(count, rank, width)
            for m in METHODS:
                curves[axis][m].append((value, seconds(m, inputs, rank)))
                print(f"{axis} {value}, {m}: {curves[axis][m][-1][1]:.3f} CPU s", flush=True)
            write(a.out, curves)  # what there is so far, should nobody wait for the rest


def write(out: Path, curves: dict[str, dict[str, list[tuple[int, float]]]]) -> None:
    """The numbers, the page, the curves."""
    machine = {"torch": torch.__version__, "threads": 1, "cores": os.cpu_count(), "load": round(os.getloadavg()[2], 1)}
    out.with_suffix(".json").write_text(json.dumps({"machine": machine, "curves": curves}, indent=1) + "\n")
    lines = ["# How merging grows", "", *(__doc__ or "").strip().splitlines()[2:], "", f"![curves]({out.name}.svg)"]
    measured = {axis: by_method for axis, by_method in curves.items() if any(by_method.values())}
    figure, places = plt.subplots(
        1, len(measured), figsize=(4.5 * len(measured), 4.2), layout="constrained", squeeze=False
    )
    for place, (axis, by_method) in zip(places[0], measured.items(), strict=True):
        for method, points in by_method.items():
            place.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=method)
        place.set(xlabel=axis, ylabel="CPU seconds")
        values = [value for value, _ in next(iter(by_method.values()))]
        head = f"| {axis} | {' | '.join(map(str, values))} | exponent of the last step |"
        lines += ["", f"## By {axis}", "", head, "|---" * (len(values) + 2) + "|"]
        for method, points in by_method.items():
            cells = [f"{dict(points)[value]:.3f}" if value in dict(points) else "not run" for value in values]
            lines.append(f"| {method} | {' | '.join(cells)} | {exponent(points):.1f} |")
    places[0][0].legend(fontsize=7)
    lines += ["", _BOTTOM.format(**machine)]
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
