"""What runs of a study took and on what: a line of JSON each in its folder, for the page to say."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plait.border.checked import Json, Record
from plait.border.counts import plural
from plait.disk.durable import absent_above, flush_above, flush_folder
from plait.disk.files import require_regular
from plait.disk.locks import system_errors
from plait.errors import PlaitError
from plait.runs.folder import published

JOURNAL = "runs.jsonl"


@contextlib.contextmanager
def noted(out: Path, device: str, executor: str, workers: int, scorers: int) -> Iterator[None]:
    """Note date, command, seconds and hardware of what runs inside, also where it ends with an error.

    Args:
        out: Folder of the study.
        device: Its base's device ("cuda", "cpu").
        executor: Name of the executor; units on a Ray cluster run on hardware that this machine does not know.
        workers: Batches of trainings at once.
        scorers: Other batches at once.
    """
    out = out.absolute()
    if not out.exists():
        made = absent_above(out)
        out.mkdir(parents=True, exist_ok=True)
        flush_above(out, made)  # what its units flush is of no use in a folder that a power loss takes away
    started, date = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    _append(out, {"begun": date})  # what a run leaves that is killed; a power loss may take it
    try:
        yield
    finally:
        line: Json = {"started": date, "command": command(sys.argv)}
        line |= {"seconds": round(time.monotonic() - started, 1), "executor": executor, "workers": workers}
        line |= {"scorers": scorers, "hardware": "a Ray cluster" if executor == "RayCluster" else hardware(device)}
        _append(out, line, flush=True)


def _append(out: Path, line: Json, *, flush: bool = False) -> None:
    """Write a line below the others, on a line of its own also where a power loss has torn the last."""
    with system_errors(out / JOURNAL), (out / JOURNAL).open("a+b") as file:
        torn = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps(line).encode() + b"\n")
        if flush:
            file.flush()
            os.fsync(file.fileno())
            flush_folder(out)


def command(arguments: Sequence[str]) -> str:
    """Write a command line of plait as it may be shown to others: folders by their last name; "" where it is none of plait's.

    >>> command(["/home/me/.venv/bin/plait", "run", "/home/me/my.yaml", "--set", "data.root=/home/me/rows"])
    'plait run ./my.yaml --set data.root=./rows'
    """
    program = Path(arguments[0]) if arguments else Path()
    if program.name != "plait" and program.parts[-2:] != ("plait", "__main__.py"):
        return ""
    shown = []
    for argument in arguments[1:]:
        key, is_pair, value = argument.rpartition("=")
        shown.append(f"{key}{is_pair}{published(value)}")
    return shlex.join(["plait", *shown])


def hardware(device: str) -> str:
    """What computes on a device of this machine, in a few words."""
    import torch

    if device.startswith("cuda"):
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names))
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def about_runs(out: Path) -> dict[str, str]:
    """Dates, the last command, hardware, processes and seconds of all runs noted in a folder; {} where none are.

    Lines that cannot be read (one may be cut, by a power loss) are counted, not passed over in silence.
    """
    path = out / JOURNAL
    if not path.is_file():
        return {}
    require_regular(path)
    noted = [_run(line) for line in path.read_bytes().splitlines() if line.strip()]
    lost = sum(r is None for r in noted)
    runs = [r for r in noted if r is not None and "begun" not in r]
    begun = Counter(r["begun"] for r in noted if r is not None and "begun" in r)
    cut = (begun - Counter(r["started"] for r in runs)).total()  # killed, or still at work
    if not runs:
        return {"seconds": f"unknown: {plural(lost, 'line')} of {JOURNAL} cannot be read"} if lost else {}
    runs = [r for r in runs if r["seconds"] >= 1] or runs  # a look at a finished study is no run
    seconds = sum(r["seconds"] for r in runs)
    dates = sorted(r["started"][:10] for r in runs if r["started"])
    commands = [r["command"] for r in runs if r["command"]]
    return {
        **({"date": " to ".join(dict.fromkeys((dates[0], dates[-1])))} if dates else {}),
        **({"command": commands[-1]} if commands else {}),
        "hardware": _each([r["hardware"] for r in runs]),
        "executor": _each([f"{r['executor']} ({r['workers']} training, {r['scorers']} scoring)" for r in runs]),
        "seconds": f"{seconds:.0f} in {plural(len(runs), 'run')}"
        + (f", {cut} more did not come to an end" if cut else "")
        + (f", {lost} more cannot be read" if lost else ""),
    }


def _run(line: bytes) -> Json | None:
    """One line of the journal; None if it is none."""
    try:
        record = Record.of(json.loads(line), JOURNAL)
        if record.has("begun"):
            return {"begun": record.text("begun")}
        texts = {key: record.text(key) for key in ("hardware", "executor")}
        texts |= {key: record.text(key, "") for key in ("started", "command")}  # earlier versions did not note them
        counts = {key: record.integer(key) for key in ("workers", "scorers")}
        return {**texts, **counts, "seconds": record.number("seconds", 0)}
    except (ValueError, RecursionError, PlaitError):
        return None


def _each(texts: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, texts)))
