"""What plait is attacked with, counted: every part is a module here and writes one JSON file of rows.

A part, ``benchmarks/trust/PART.py``, is run by ``PYTHONPATH=src:. python -P -m benchmarks.trust.PART --to FOLDER`` and ends
with `write_part`, which writes ``FOLDER/PART.json``::

    {
        "part": "kills",
        "command": "...",
        "seconds": 12.3,
        "versions": {...},
        "rows": [{"what": "plait merge, killed at a random moment", "tried": 25, "held": 25, "fell": 0, "notes": []}],
    }

`what` names the attack and what held means in it; ``tried == held + fell``; `notes` holds a line for each that fell, or what
the reader must know about the figure. ``python -P -m benchmarks.trust FOLDER --out trust.json`` gathers all parts of a folder.
A part takes ``--seed`` and ``--sample N`` (a share of its attacks, for a quick look) where that makes sense.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from plait.disk.store import versions

STARTED = time.monotonic()


@dataclass(frozen=True, slots=True)
class Row:
    """One attack: how often it was tried, and how often what was promised held."""

    what: str
    tried: int
    held: int
    fell: int
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tried != self.held + self.fell or min(self.tried, self.held, self.fell) < 0:
            raise ValueError(f"{self.what}: {self.tried} tried, {self.held} held, {self.fell} fell")


def row(what: str, outcomes: Iterable[str], notes: Iterable[str] = ()) -> Row:
    """Count outcomes: "" for each that held, and what happened for each that fell (the first twenty are kept)."""
    found = list(outcomes)
    fell = [text for text in found if text]
    return Row(what, len(found), len(found) - len(fell), len(fell), (*fell[:20], *notes))


def write_part(folder: Path, part: str, rows: Iterable[Row], command: str = "") -> Path:
    """Write a part's file; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        "part": part,
        "command": re.sub(r"--to \S+", "--to parts", command or f"python -P -m benchmarks.trust.{part} --to parts"),
        "seconds": round(time.monotonic() - STARTED, 1),
        "versions": versions(),
        "rows": [asdict(r) for r in rows],
    }
    path = folder / f"{part}.json"
    path.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    return path


def gathered(folder: Path) -> dict[str, object]:
    """All parts of a folder as one object: `rows` (each with its part) and `parts` (how each was run)."""
    parts = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    rows = [{"part": p["part"], **r} for p in parts for r in p["rows"]]
    for r in rows:
        Row(r["what"], r["tried"], r["held"], r["fell"])  # refuses what does not add up
    return {"rows": rows, "parts": [{k: v for k, v in p.items() if k != "rows"} for p in parts]}
