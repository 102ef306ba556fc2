"""python -P -m tests.fuzz --count 100000 [--processes 2] [--only mergekit] [--seconds 600] [--to rows.json]"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.fuzz.driver import fuzz, rows


def main() -> int:
    """Run, print the rows, and end with 1 where something fell."""
    parser = argparse.ArgumentParser(description="Feed changed files to every reader.")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--to", type=Path, help="file of the rows, kept up to date")
    given = parser.parse_args()
    tallies = fuzz(
        given.count, processes=given.processes, seed=given.seed, only=given.only, seconds=given.seconds, log=given.to
    )
    sys.stdout.write(json.dumps(rows(tallies), indent=1) + "\n")
    return int(any(t.fell for t in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
