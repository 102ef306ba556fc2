"""Raw bytes guided by coverage, where atheris is installed: ``python -P -m tests.fuzz.by_coverage CORPUS -max_total_time=600``.

The first byte chooses the reader, the second whether the rest is the file itself or the dice of a structured mutation.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["plait"]):
    from tests.fuzz.targets import TARGETS, attempt, write

_PLACE = Path(tempfile.mkdtemp(prefix="plait-fuzz-"))
_SEEDS = [target.seeds() for target in TARGETS]


def one(data: bytes) -> None:
    """One input: what falls is raised, so that it is kept."""
    if len(data) < 3:
        return
    number, structured = data[0] % len(TARGETS), data[1] % 2
    target, start = TARGETS[number], _SEEDS[number][data[2] % len(_SEEDS[number])]
    if structured:
        files = target.change(start, random.Random(data[3:]))
    else:
        name = sorted(start)[data[2] % len(start)]
        files = start | {name: data[3:]}
    error = attempt(target, write(files, _PLACE, target.file))[1]
    if error is not None:
        raise error


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
