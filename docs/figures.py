"""The figures of docs/theory.md, from docs/results: `python docs/figures.py` writes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

DOCS = Path(__file__).resolve().parent
STYLE = {
    "svg.hashsalt": "plait",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}
ARMS = {  # colour-blind palette of Okabe and Ito
    "kaiming": ("PEFT's default", "#999999"),
    "osrm_mean": ("OSRM: others weak", "#E69F00"),
    "contrastive": ("contrastive: own strong, others weak", "#0072B2"),
    "kaiming_penalised": ("PEFT's default and penalty", "#CC79A7"),
    "contrastive_penalised": ("contrastive and penalty", "#009E73"),
}


def write_all(folder: Path) -> list[Path]:
    """Write every figure into a folder, the same bytes each time."""
    with mpl.rc_context(STYLE):
        figures = {"theory-directions": directions(), "theory-starts": starts(), "theory-scale": scale()}
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    return [folder / f"{name}.svg" for name in figures]


def directions() -> Figure:
    """Draw two tasks' second moments in two dimensions, and the direction that each of three criteria takes."""
    own, others = np.array([[1.0, 0.55], [0.55, 0.5]]), np.array([[1.0, -0.1], [-0.1, 0.18]])
    smallest = np.linalg.eigh(others)[1][:, 0]
    largest = np.linalg.eigh(own)[1][:, -1]
    ratio = np.linalg.eigh(_whitened(own, others))[1][:, -1]
    ratio = np.linalg.solve(np.linalg.cholesky(others).T, ratio)
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.add_subplot()
    for moment, colour, label in ((own, "#0072B2", "own inputs"), (others, "#E69F00", "the others' inputs")):
        values, vectors = np.linalg.eigh(moment)
        angle = np.degrees(np.arctan2(vectors[1, -1], vectors[0, -1]))
        width, height = 2 * np.sqrt(values[::-1])
        axes.add_patch(Ellipse((0, 0), width, height, angle=angle, alpha=0.3, color=colour, label=label))
    said = (
        ("own strongest", largest, ":"),
        ("others weakest (OSRM)", smallest, "--"),
        ("own over others (contrastive)", ratio, "-"),
    )
    for name, vector, line in said:
        unit = vector / np.linalg.norm(vector) * np.sign(vector[1])
        gain = float(unit @ own @ unit / (unit @ others @ unit))
        axes.plot(
            [0, 1.25 * unit[0]], [0, 1.25 * unit[1]], line, color="black", label=f"{name}: own / others {gain:.1f}"
        )
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.05, 1.35), aspect="equal", xticks=[], yticks=[])
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return figure


def _whitened(own: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    root = np.linalg.inv(np.linalg.cholesky(others))
    whitened: np.ndarray[Any, Any] = root @ own @ root.T
    return whitened


def starts() -> Figure:
    """Draw what merges keep by how the adapters were started and trained: ten seeds on the decoder of 135 M."""
    rows = _read("text3-smollm2-finalists")["rows"]
    figure = Figure(figsize=(6.4, 2.6))
    axes = figure.add_subplot()
    for place, (arm, (_, colour)) in enumerate(reversed(ARMS.items())):
        for merge, mark in (("task_arithmetic", "o"), ("tsv", "s"), ("regmean", "^")):
            values = [100 * r["recovered"] for r in rows if (r["arm"], r["method"], r["variant"]) == (arm, merge, "")]
            axes.plot(np.mean(values), place, mark, color=colour, ms=7)
    axes.set_yticks(range(len(ARMS)), [name for name, _ in reversed(ARMS.values())])
    axes.set(xlim=(0, 100), xlabel="recovered, % of what plain adapters gain alone (mean of ten seeds)")
    for mark, merge in (("o", "task arithmetic"), ("s", "TSV-M"), ("^", "RegMean")):
        axes.plot([], [], mark, color="black", label=merge)
    axes.legend(frameon=False, loc="lower left")
    return figure


def scale() -> Figure:
    """Draw the share kept over the scale of a plain sum: nine written tasks, a decoder of 1.5 B, one seed."""
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.add_subplot()
    for record in sorted(_read("scales-text-qwen15"), key=lambda r: list(ARMS).index(r["arm"])):
        name, colour = ARMS[record["arm"]]
        method, floor, alone = record["methods"]["task_arithmetic"], np.mean(record["floor"]), np.mean(record["alone"])
        shares = 100 * (np.mean(method["scores"], axis=1) - floor) / (alone - floor)
        axes.plot(method["scales"], shares, "o-", color=colour, label=name, ms=4)
        at = np.interp(method["moments"], method["scales"], shares)
        axes.plot(min(method["moments"], method["scales"][-1]), at, "o", mfc="none", mec=colour, ms=11)
    axes.axhline(100, color="black", lw=0.6, ls=":")
    axes.axhline(0, color="black", lw=0.6, ls=":")
    axes.set(xlabel="scale of the sum", ylabel="kept of own adapters, %", ylim=(-35, 108))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _read(name: str) -> Any:
    return json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "images"
    target.mkdir(exist_ok=True)
    for path in write_all(target):
        print(path)
