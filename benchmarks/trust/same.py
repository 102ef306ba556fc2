"""Merges repeated with other numbers of threads and in other orders: ``python -P -m benchmarks.trust.same --to FOLDER``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.trust import Row, row, write_part
from tests.merging.test_same_bytes import NAMES, OF_STATISTICS, PAIRS, merged, saved

from plait.merging import merge_methods


def main() -> None:
    """Run every method that needs no statistics, and write the part's file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--width", type=int, default=384, help="of the modules: torch splits products of this size")
    chosen = parser.parse_args()
    rows = [repeated(m, chosen.runs, chosen.width) for m in sorted({*merge_methods()} - OF_STATISTICS)]
    for r in rows:
        print(f"{r.what}: {r.held} of {r.tried}", file=sys.stderr)
    write_part(chosen.to, "same", rows, " ".join(["python -P -m benchmarks.trust.same", *sys.argv[1:]]))


def repeated(method: str, runs: int, width: int) -> Row:
    """One method over one module and over thirty: each run against the first."""
    outcomes = []
    for modules in (1, 30):  # a thread of its own for each module only where there is much to do
        with tempfile.TemporaryDirectory() as scratch:
            names = NAMES[: 2 if method in PAIRS else 3]
            trio = [saved(Path(scratch) / n, i, width=width, modules=modules) for i, n in enumerate(names)]
            weights = dict(zip(trio, (1.0, 0.5, 2.0), strict=False))
            first = None
            for i in range(runs):
                order, threads = trio[i % len(trio) :] + trio[: i % len(trio)], 1 + i % 2
                files = merged(order, Path(scratch) / "out", method, threads, weights=[weights[f] for f in order])
                first = first or files
                other = sorted(n for n in {*first, *files} if first.get(n) != files.get(n))
                said = f"run {i} of {modules} modules with {threads} threads: other bytes in {', '.join(other)}"
                outcomes.append(said if other else "")
    return row(f"{method}: runs with 1 and 2 threads, in every order of the adapters: the same bytes", outcomes)


if __name__ == "__main__":
    main()
