"""Gather the parts of a folder into trust.json and trust.md, and print them.

Exit code 1 if anything fell; lines that no input reaches and mutants that survive are measures, to be read.

``PYTHONPATH=src:. python -P -m benchmarks.trust FOLDER --out docs/results/trust``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.trust.page import write

_MEASURES = ("reached", "mutants")
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("--out", type=Path, required=True, help="without .json and .md")
parser.add_argument("--remark", action="append", default=[], help="a paragraph about this run, for the top of the page")
parser.add_argument(
    "--beside", type=Path, help="an earlier page's JSON: its rows stay where they were not tried again as often"
)
chosen = parser.parse_args()
rows = write(chosen.folder, chosen.out, chosen.remark, chosen.beside)["rows"]
for r in rows:
    print(f"{r['part']}: {r['what']}: tried {r['tried']}, held {r['held']}, fell {r['fell']}")
sys.exit(any(r["fell"] for r in rows if r["part"] not in _MEASURES))
