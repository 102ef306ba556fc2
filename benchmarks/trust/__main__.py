"""Gather the parts of a folder into one JSON file, and print what fell."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.trust import gathered

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("--out", type=Path, required=True)
chosen = parser.parse_args()
found = gathered(chosen.folder)
chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
rows: list[dict] = found["rows"]  # type: ignore[assignment]
for r in rows:
    print(f"{r['part']}: {r['what']}: tried {r['tried']}, held {r['held']}, fell {r['fell']}")
sys.exit(any(r["fell"] for r in rows))
