"""Changed files fed to the six readers: ``PYTHONPATH=src:. python -P -m benchmarks.trust.fuzz --to FOLDER --count 1000000``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.trust import Row, write_part
from tests.fuzz.driver import fuzz, rows


def main() -> None:
    """Run and write the part's file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--sample", type=float, default=1.0, help="share of the inputs, for a quick look")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="readers whose name holds this, who then share the count")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="nothing is begun after so long")
    given = parser.parse_args()
    given.to.mkdir(parents=True, exist_ok=True)
    count = round(given.count * given.sample)
    told = {"processes": given.processes, "seed": given.seed, "only": given.only, "seconds": given.seconds}
    tallies = fuzz(count, **told)
    found = [Row(r["what"], r["tried"], r["held"], r["fell"], tuple(r["notes"])) for r in rows(tallies)]
    write_part(given.to, "fuzz", found, " ".join(["python -P -m benchmarks.trust.fuzz", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
