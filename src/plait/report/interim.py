"""The numbers of a run as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from plait.report.table import rows_of
from plait.runs.layout import Layout


def write_report(folder: Path, layout: Layout) -> None:
    """Write report.json."""
    rows = [r for r in rows_of(layout) if not r.variant]
    arms = list(dict.fromkeys(r.arm for r in rows))

    def mean(xs):
        return sum(xs) / len(xs)

    def table(f):
        return {
            a: {
                m: mean([f(r) for r in rows if (r.arm, r.method) == (a, m)])
                for m in dict.fromkeys(r.method for r in rows)
            }
            for a in arms
        }

    head = {"individual": {a: mean([r.individual for r in rows if r.arm == a]) for a in arms}, "floor": rows[0].floor}
    head |= {
        "merged": table(lambda r: r.merged),
        "recovered": table(lambda r: r.recovered if r.recovered == r.recovered else -9),
    }
    (folder / "report.json").write_text(json.dumps({"headline": head}))
    (folder / "report.html").write_text(" ".join(arms))
