"""Run the cases and write the page.

``PYTHONPATH=src:. python -P -m benchmarks.speed --work .bench --out docs/results/speed``
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import os
import sys
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.speed.measuring import compared
from benchmarks.speed.page import write

import plait

SETS = ("merging", "many")
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--work", type=Path, required=True, help="for inputs, which are made once, and results: 12 GB")
parser.add_argument("--out", type=Path, required=True, help="without .json and .md")
parser.add_argument("--sets", default=",".join(SETS))
parser.add_argument("--only", default="", help="cases whose words hold this")
parser.add_argument("--repeats", type=int, default=None, help="in the place of each case's own number")
chosen = parser.parse_args()
# As an installer does: where Python may not write its bytecode, every command would compile all that it imports.
compileall.compile_dir(str(Path(plait.__file__).parent), quiet=1)


def shown(command: str) -> str:
    """A command without the places of this machine."""
    for place, name in ((str(chosen.work), "WORK"), (sys.executable, "python"), (f"{Path.cwd()}/", "")):
        command = command.replace(place, name)
    return command


rows = []
for name in chosen.sets.split(","):
    for case in importlib.import_module(f"benchmarks.speed.{name}").cases(chosen.work):
        if chosen.only in case.what:
            case = case if chosen.repeats is None else replace(case, repeats=chosen.repeats)
            last = compared(case, [sys.executable, "-P", "-m", "plait"])
            rows.append(replace(last, command=shown(last.command)))
            ratio = "" if last.ratio is None else f", {last.ratio:.2f}x {last.beside}"
            print(
                f"{last.what}: {last.seconds:.2f} s, {last.cpu:.2f} CPU s, {last.peak_mb:.0f} MB, wrote {last.written_mb:.0f} MB{ratio}",
                flush=True,
            )
versions = ", ".join(
    f"{p} {version(p)}" for p in ("torch", "numpy", "safetensors", *(["numba"] if find_spec("numba") else []))
)
threads = os.environ.get("OMP_NUM_THREADS", "default")
write(
    chosen.out,
    rows,
    {"cores": os.cpu_count(), "threads": threads, "versions": versions, "load": round(os.getloadavg()[2], 1)},
)
