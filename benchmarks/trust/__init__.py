"""What plait is attacked with, counted: every part is a module here and writes one JSON file of rows.

A part, ``benchmarks/trust/PART.py``, is run by ``PYTHONPATH=src:. python -P -m benchmarks.trust.PART --to FOLDER`` and ends
with `write_part`, which writes ``FOLDER/PART.json``::

    {
        "part": "kills",
        "command": "...",
        "seconds": 12.3,
        "versions": {...},
        "source": "3f...",
        "rows": [{"what": "plait merge, killed at a random moment", "tried": 25, "held": 25, "fell": 0, "notes": []}],
    }

`what` names the attack and what held means in it; ``tried == held + fell``; `notes` holds a line for each that fell, or what
the reader must know about the figure. `source` is a digest of plait's source: a part may be run in pieces, into folders inside of
FOLDER, whose rows are added up where it is the same. ``python -P -m benchmarks.trust FOLDER --out trust.json`` gathers all parts.
A part takes ``--seed`` and ``--sample N`` (a share of its attacks, for a quick look) where that makes sense.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import plait
from plait.disk.store import versions

STARTED = time.monotonic()
T = TypeVar("T")


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

    def plus(self, other: Row) -> Row:
        """Both together, of the same attack."""
        held, fell = self.held + other.held, self.fell + other.fell
        return Row(self.what, self.tried + other.tried, held, fell, tuple(dict.fromkeys(self.notes + other.notes)))


def row(what: str, outcomes: Iterable[str], notes: Iterable[str] = ()) -> Row:
    """Count outcomes: "" for each that held, and what happened for each that fell (the first twenty are kept)."""
    found = list(outcomes)
    fell = [text for text in found if text]
    return Row(what, len(found), len(found) - len(fell), len(fell), (*fell[:20], *notes))


def undisturbed(what: str, attack: Callable[[], T], failed: Callable[[Row], T]) -> T:
    """What an attack finds; where its command fails with nobody disturbing it, one row that says so, so that the others go on."""
    try:
        return attack()
    except RuntimeError as e:
        return failed(row(f"plait {what}, undisturbed", [str(e)]))


def write_part(
    folder: Path, part: str, rows: Iterable[Row], command: str = "", more: Mapping[str, Any] | None = None
) -> Path:
    """Write a part's file, with what it has to tell beside the rows; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        "part": part,
        "command": re.sub(
            r"--(to|map) \S+", r"--\1 parts", command or f"python -P -m benchmarks.trust.{part} --to parts"
        ),
        "seconds": round(time.monotonic() - STARTED, 1),
        "versions": versions(),
        "source": source(),
        "rows": [asdict(r) for r in rows],
        **(more or {}),
    }
    path = folder / f"{part}.json"
    path.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    return path


def source() -> str:
    """A digest of plait's source, by which pieces of one part are known to be of the same code."""
    root, digest = Path(plait.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def added(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """Pieces of one part as one: rows of the same attack added up, commands and notes one after the other.

    Raises:
        ValueError: An attack was tried on different sources, whose figures do not add up.
    """
    first, rows, of = pieces[0], dict[str, Row](), dict[str, str]()
    for origin, r in [(piece["source"], r) for piece in pieces for r in piece["rows"]]:
        one, other = Row(**r | {"notes": tuple(r["notes"])}), rows.get(r["what"])
        if of.setdefault(one.what, origin) != origin:
            raise ValueError(f"{one.what}: its pieces are of different sources")
        rows[one.what] = one if other is None else other.plus(one)
    lists = {
        k: [x for p in pieces for x in p.get(k, ())] for k, v in first.items() if isinstance(v, list) and k != "rows"
    }
    return {
        **first,
        **lists,
        "source": "; ".join(dict.fromkeys(p["source"] for p in pieces)),
        "command": "; ".join(dict.fromkeys(p["command"] for p in pieces)),
        "seconds": round(sum(p["seconds"] for p in pieces), 1),
        "rows": [{**asdict(r), "source": of[r.what]} for r in rows.values()],
    }


def joined(part: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """A part with the rows of an earlier page, each with the state of the source it was taken on.

    What was tried again at least as often is told by its new row alone; else both stand, and are never added up.
    """
    own = [{**r, "source": r.get("source", part["source"])} for r in part["rows"]]
    tried = {r["what"]: r["tried"] for r in own}
    old = [{**r, "source": r.get("source", earlier["source"])} for r in earlier["rows"]]
    kept = [r for r in old if r["tried"] > tried.get(r["what"], 0)]
    if not kept:
        return {**part, "rows": own}
    told = {
        key: "; ".join(dict.fromkeys(text for p in (earlier, part) for text in p[key].split("; ")))
        for key in ("source", "command")
    }
    lists = {k: [*earlier.get(k, ()), *part[k]] for k, v in part.items() if isinstance(v, list) and k != "rows"}
    return {**part, **told, **lists, "seconds": round(earlier["seconds"] + part["seconds"], 1), "rows": [*kept, *own]}


def _parts_of(page: Path) -> dict[str, dict[str, Any]]:
    """The parts of a page that was written before, with their rows."""
    found = json.loads(page.read_text(encoding="utf-8"))
    rows = [(r["part"], {k: v for k, v in r.items() if k != "part"}) for r in found["rows"]]
    return {p["part"]: {**p, "rows": [r for part, r in rows if part == p["part"]]} for p in found["parts"]}


def gathered(folder: Path, earlier: Path | None = None) -> dict[str, object]:
    """All parts of a folder as one object: `rows` (each with its part and source) and `parts` (how each was run).

    Args:
        folder: What the parts wrote.
        earlier: A page's JSON, whose rows stand beside those of the folder; see `joined`.
    """
    pieces: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.rglob("*.json")):
        piece = json.loads(path.read_text(encoding="utf-8"))
        pieces.setdefault(piece["part"], []).append(piece)
    parts = [added(found) for _, found in sorted(pieces.items())]
    if earlier is not None:
        before = _parts_of(earlier)
        parts = [joined(p, before.pop(p["part"])) if p["part"] in before else p for p in parts]
        parts = sorted([*parts, *before.values()], key=lambda p: p["part"])
    rows = [{"part": p["part"], "source": p["source"], **r} for p in parts for r in p["rows"]]
    for r in rows:
        Row(r["what"], r["tried"], r["held"], r["fell"])  # refuses what does not add up
    return {"rows": rows, "parts": [{k: v for k, v in p.items() if k != "rows"} for p in parts]}
