"""The page of benchmarks/merging.py: its tables, made of the rows and of nothing else.

python benchmarks/merging_page.py docs/results     # merging.md anew, from merging.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# What the issue asks for: label, methods, largest multiple of the floor.
FLOORS = (
    ("linear, cat, task_arithmetic", ("linear", "cat", "task_arithmetic"), 4),
    ("svd, tsv, iso_c, core_space, slerp", ("svd", "tsv", "iso_c", "core_space", "slerp"), 10),
    ("knots", ("knots",), 60),
)
DENSE_LIMIT, STATISTICS_LIMIT, PEAK_LIMIT = 10, 2, 200


def times(rows: list[Row]) -> str:
    """Every row."""
    lines = [
        "| shape | tool | method | seconds | over the floor | verified, over the floor | over the floor that writes as much "
        "| whole process | peak MB | disk MB | runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "seconds" not in r:
            lines.append(f"| {r['shape']} | {r['tool']} | {r['method']} | failed: {r.get('error', '')} | | | | | | | |")
            continue
        more = "over " if r.get("stopped") else ""  # a run that was stopped is a lower bound
        dense = f" (dense part: {r['over_row_block_sum']:.1f}x the plain sum)" if "over_row_block_sum" in r else ""
        disk = f"{r['disk_mb']:.0f}" if "disk_mb" in r else ""
        verified = f"{r['over_floor_verified']:.1f}x" if "over_floor_verified" in r else ""
        exact = f"{more}{r['over_floor_exact']:.1f}x" if "over_floor_exact" in r else ""
        lines.append(
            f"| {r['shape']} | {r['tool']} | {r['method']} | {more}{r['seconds']:.3f} | {more}{r['over_floor']:.1f}x{dense} "
            f"| {verified} | {exact} | {more}{r['process_seconds']:.1f} s | {r['peak_mb']:.0f} | {disk} | {r['runs']} |"
        )
    return "\n".join(lines)


def targets(rows: list[Row]) -> str:
    """The issue's targets beside what was measured, shape by shape."""
    lines = ["| target | shape | measured | |", "|---|---|---|---|"]
    for shape in dict.fromkeys(r["shape"] for r in rows):
        mine = {r["method"]: r for r in rows if r["shape"] == shape and r["tool"] == "plait" and "seconds" in r}
        for label, methods, limit in FLOORS:
            found = {m: mine[m]["over_floor"] for m in methods if m in mine}
            lines += _line(f"{label} <= {limit}x the floor", shape, found, limit)
        dense = {m: r["over_row_block_sum"] for m, r in mine.items() if "over_row_block_sum" in r}
        lines += _line(f"dense part <= {DENSE_LIMIT}x the plain row-block sum", shape, dense, DENSE_LIMIT)
        if {"regmean", "read_statistics"} <= mine.keys():
            read, solves = mine["read_statistics"]["seconds"], mine["read_statistics"]["solve_seconds"]
            ratio = {"regmean": (mine["regmean"]["seconds"] - solves) / read}
            label = f"regmean <= {STATISTICS_LIMIT}x of reading its statistics ({read:.1f} s), its solves ({solves:.1f} s) apart"
            lines += _line(label, shape, ratio, STATISTICS_LIMIT)
        peaks = {m: r["peak_mb"] for m, r in mine.items() if m not in ("regmean", "read_statistics")}
        lines += _line(f"peak <= {PEAK_LIMIT} MB above `import torch`", shape, peaks, PEAK_LIMIT, " MB", 0)
    return "\n".join(lines)


def _line(label: str, shape: str, found: dict[str, float], limit: float, unit: str = "x", digits: int = 1) -> list[str]:
    if not found:
        return []
    missed = [m for m, value in found.items() if value > limit]
    verdict = f"**missed** by {', '.join(missed)}" if missed else "met"
    shown = ", ".join(f"{m} {value:.{digits}f}{unit}" for m, value in found.items())
    return [f"| {label} | {shape} | {shown} | {verdict} |"]


def peers(rows: list[Row]) -> str:
    """What the other tools take for what plait does, as multiples of plait's own seconds, its verification counted."""
    lines = [
        "| shape | tool | method | over the floor | plait's nearest method | times plait's seconds, verified |",
        "|---|---|---|---|---|---|",
    ]
    nearest = {"ties_svd": "ties"}
    for r in rows:
        if r["tool"] not in ("peft", "mergekit") or "seconds" not in r:
            continue
        name = nearest.get(r["method"], r["method"])
        ours = next((o for o in rows if (o["shape"], o["tool"], o["method"]) == (r["shape"], "plait", name)), {})
        more = "over " if r.get("stopped") else ""
        seconds = ours.get("seconds_verified", ours.get("seconds"))
        ratio = f"{more}{r['seconds'] / seconds:.1f}x" if seconds else ""
        lines.append(
            f"| {r['shape']} | {r['tool']} | {r['method']} | {more}{r['over_floor']:.1f}x | {name} | {ratio} |"
        )
    return "\n".join(lines)


def run(found: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    floors = {r["shape"]: r["seconds"] / r["over_floor"] for r in found["rows"] if "over_floor" in r}
    shown = ", ".join(f"{1000 * seconds:.0f} ms ({shape})" for shape, seconds in floors.items())
    return (
        f"    {found['command']}\n\n{machine['cores']} cores, {machine['threads']} threads, Python {machine['python']}; "
        f"{versions}. The floor: {shown}."
    )


def publish(folder: Path, found: dict[str, Any]) -> None:
    """Write merging.json, and merging.md: the prose of merging_page.md around the tables."""
    rows, text = found["rows"], Path(__file__).with_suffix(".md").read_text()
    made = {"run": run(found), "times": times(rows), "targets": targets(rows), "peers": peers(rows)}
    for name, table in made.items():
        if text.count(f"{{{{ {name} }}}}") != 1:
            raise SystemExit(f"merging_page.md has no one place for {name}")
        text = text.replace(f"{{{{ {name} }}}}", table)
    (folder / "merging.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "merging.md").write_text(text)


if __name__ == "__main__":
    publish(Path(sys.argv[1]), json.loads((Path(sys.argv[1]) / "merging.json").read_text()))
