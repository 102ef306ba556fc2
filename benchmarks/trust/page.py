"""The page of what was tried: parts of a folder as docs/results/trust.json and docs/results/trust.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.trust import gathered
from benchmarks.trust.findings import table

_TOP = """# What plait was attacked with

Every row is one attack, made by `make trust` or by the part's own command below it: how often it was tried, how often what was
promised held, and how often it did not. All rows are in [trust.json](trust.json); what is promised stands in [trust.md](../trust.md).
"""
_PARTS = {
    "cases": "Bad inputs",
    "fuzz": "Fuzzed inputs",
    "reached": "What the fuzzed inputs reach",
    "flips": "Flipped bits",
    "kills": "Kills",
    "power": "Power losses",
    "disks": "Full disks",
    "same": "The same merge again",
    "mutants": "Mutants of the source that the tests kill",
}
_HOW = {
    "power": """Each command runs once under strace, which sees every write, flush, rename and entry, also those of libraries that write
without Python. The record is followed to its end and must give what is on the disk. Then each beginning of it is replayed as the weakest
file system that POSIX allows may leave it: bytes of files that were not flushed kept, dropped, cut or zeros; entries of folders that were
not flushed kept or dropped, each apart. In each state `plait check`, the reader and the command that asks whether its result is done find
the old result, the new one, or say what is wrong; and the old result lies there wherever the new one does not.""",
    "kills": """A command is killed (SIGKILL) at a moment drawn over the time that it takes, and run again, in a fresh copy of a small
world. Held: the second run succeeds, inputs are unchanged, nothing hidden is left, and the result has the bytes of an undisturbed one,
recorded times aside.""",
    "disks": """A command runs on a tmpfs of which a random part of what it needs is free. Held: exit code 4 (or 0 where it
fitted in) and one line, nothing half written, the old result untouched; and once there is room, the same command ends in the bytes
of an undisturbed one.""",
    "flips": """A bit of every byte of every file of a small merge (weights, heads, config, manifest) and of small
LoRA, Fisher and statistics files, one at a time.""",
    "reached": """Statements in functions of the readers' files, but for those that write or collect; *held* are reached, *fell*
are not.""",
    "mutants": """Small faults drawn at random over the source (comparisons, arithmetic, constants, conditions, removed
statements), each run against the tests that reach its line, then against all tests of the files that touch its module. *Held* are
those that a test notices.""",
    "fuzz": """Valid files changed where their structure is (values, keys, shapes, offsets, JSON inside metadata, bytes).""",
}


def page(found: dict[str, Any], remarks: Iterable[str] = ()) -> str:
    """The page in Markdown: a table for each part, its command and versions, what fell, and the findings."""
    lines = [_TOP, *remarks]
    for part in sorted(found["parts"], key=lambda p: list(_PARTS).index(p["part"]) if p["part"] in _PARTS else 99):
        name = part["part"]
        rows = [r for r in found["rows"] if r["part"] == name]
        lines += [
            "",
            f"## {_PARTS.get(name, name)}",
            "",
            *([_HOW[name], ""] if name in _HOW else []),
            f"    {part['command']}",
            "",
        ]
        lines += [_versions(part), "", "| what | tried | held | fell | state |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {_cell(r['what'])} | {r['tried']:,} | {r['held']:,} | {r['fell']:,} | {_state(r)} |" for r in rows
        ]
        notes = [(r, note) for r in rows for note in r["notes"]]
        lines += ["", *[f"- {_cell(_short(r['what']))}: {_cell(note)}" for r, note in notes]] if notes else []
    lines += ["", "## Findings of the first attack", "", "Each was mended as its kind.", "", *table()]
    return "\n".join(lines) + "\n"


def _versions(part: dict[str, Any]) -> str:
    names = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    names += f"; source {part['source']}"
    return f"{part['seconds']:,} seconds; {names}." if part["seconds"] else f"{names}."


def _state(row: dict[str, Any]) -> str:
    """The source that a row was taken on; several of an earlier page, which did not say it row by row."""
    return ", ".join(source[:8] for source in row["source"].split("; "))


def _short(what: str) -> str:
    return what.split(":", maxsplit=1)[0].split(", killed", maxsplit=1)[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def write(folder: Path, out: Path, remarks: Iterable[str] = (), earlier: Path | None = None) -> dict[str, Any]:
    """Gather a folder's parts, beside those of an earlier page, and write OUT.json and OUT.md; returns what was gathered."""
    found: dict[str, Any] = gathered(folder, earlier)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(page(found, remarks), encoding="utf-8")
    return found
