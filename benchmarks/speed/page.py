"""The page of the timings: docs/results/speed.json and docs/results/speed.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.speed.measuring import Row

_TOP = """# How fast plait is

Whole processes, from start to end, imports included; results verified and flushed as by default. Each command runs in turns with
what stands beside it, and the fastest run of each counts: seconds are this machine's, the ratio is what carries over.
`make bench` makes this page anew; every row is in [speed.json](speed.json).

| what | seconds | CPU seconds | peak MB | written MB | beside | its seconds | ratio | aim |
|---|---|---|---|---|---|---|---|---|
"""


def write(out: Path, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    """Write both files; rows of an earlier run that were not measured now stay.

    Args:
        out: Path without suffix.
        rows: Of this run.
        machine: What it ran on.
    """
    path = out.with_suffix(".json")
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {r.what: asdict(r) for r in rows}
    merged = [fresh.pop(r["what"], r) for r in before] + list(fresh.values())
    path.write_text(json.dumps({"machine": machine, "rows": merged}, indent=1) + "\n")
    lines = [_line(Row(**r)) for r in merged]
    bottom = f"\n{machine['cores']} cores, {machine['threads']} threads, {machine['versions']}; load average {machine['load']}. "
    bottom += "A load above the cores is other work on the machine: seconds are then those of a shared one, and so are ratios\n"
    bottom += "between work that computes and work that waits for the disk.\n"
    out.with_suffix(".md").write_text(_TOP + "\n".join(lines) + "\n" + bottom)


def _line(row: Row) -> str:
    aim = [f"{row.limit:g}x" if row.limit else "", f"{row.limit_mb:g} MB" if row.limit_mb else ""]
    ratio = "" if row.ratio is None else f"**{row.ratio:.2f}**{' (CPU)' if row.by == 'cpu' else ''}"
    beside = "" if row.beside_seconds is None else f"{row.beside_seconds:.2f}"
    numbers = [f"{row.seconds:.2f}", f"{row.cpu:.2f}", f"{row.peak_mb:.0f}", f"{row.written_mb:.0f}"]
    cells = [row.what, *numbers, row.beside, beside, ratio]
    return f"| {' | '.join([*cells, ', '.join(a for a in aim if a)])} |"
