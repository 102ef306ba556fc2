"""What runs of a study took and on what: a line of JSON each in its folder, for the page to say."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

JOURNAL = "runs.jsonl"


@contextlib.contextmanager
def noted(out: Path, device: str, executor: str, workers: int, scorers: int) -> Iterator[None]:
    """Note seconds and hardware of what runs inside, also where it ends with an error.

    Args:
        out: Folder of the study.
        device: Its base's device ("cuda", "cpu").
        executor: Name of the executor; units on a Ray cluster run on hardware that this machine does not know.
        workers: Batches of trainings at once.
        scorers: Other batches at once.
    """
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        yield
    finally:
        line = {"seconds": round(time.monotonic() - started, 1), "executor": executor, "workers": workers}
        line |= {"scorers": scorers, "hardware": "a Ray cluster" if executor == "RayCluster" else hardware(device)}
        with (out / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def hardware(device: str) -> str:
    """What computes on a device of this machine, in a few words."""
    import torch

    if device.startswith("cuda"):
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names))
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def about_runs(out: Path) -> dict[str, str]:
    """Hardware, processes, and seconds of all runs noted in a folder, as the page says them; {} where none are."""
    path = out / JOURNAL
    if not path.is_file():
        return {}
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    runs = [r for r in runs if r["seconds"] >= 1] or runs  # a look at a finished study is no run
    seconds = sum(r["seconds"] for r in runs)
    return {
        "hardware": _each([r["hardware"] for r in runs]),
        "executor": _each([f"{r['executor']} ({r['workers']} training, {r['scorers']} scoring)" for r in runs]),
        "seconds": f"{seconds:.0f} in {len(runs)} run{'s' if len(runs) > 1 else ''}",
    }


def _each(texts: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, texts)))
