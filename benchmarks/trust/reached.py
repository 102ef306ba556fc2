"""How much of the readers the fuzzer's inputs reach: ``PYTHONPATH=src:. python -P -m benchmarks.trust.reached --to FOLDER``.

Counted are statements inside functions of the readers' files, but for those that write or collect. Needs the package coverage.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

from benchmarks.trust import Row, write_part
from tests.fuzz.driver import run
from tests.fuzz.targets import TARGETS

import plait

PACKAGE = Path(plait.__file__).parent
FILES = {
    "adapter folders": (
        "adapters/config.py", "adapters/head_files.py", "adapters/header.py",
        "adapters/peft_format.py", "adapters/peft_tensors.py", "adapters/file_bytes.py", "adapters/tensors.py", "adapters/weights.py",
        "disk/manifest.py",
    ),
    "statistics files": ("statistics/files.py", "statistics/records.py", "statistics/lazy.py"),
    "LoRA files of kohya and diffusers": ("formats/single_file.py", "formats/alpha.py", "formats/keys.py", "adapters/sealed.py"),
    "Fisher files": ("statistics/fisher.py",),
    "recipes and studies": ("recipes/recipe.py", "recipes/recipe_file.py", "recipes/sections.py"),
    "mergekit recipes": ("merging/mergekit.py",),
}  # fmt: skip
_OTHERS = re.compile(
    r"write|wrote|written|collect|_recording|_log_likelihood|_draw|_squared|_submodule|unscaled|tensor_names"
)


def main() -> None:
    """Feed each reader `--count` inputs under coverage, and write what share of its statements they reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--count", type=int, default=3000, help="inputs for each reader")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    rows = [reached(target.what, chosen.count, chosen.seed) for target in TARGETS]
    for r in rows:
        print(f"{r.what}: {r.held} of {r.tried}; {r.notes[0]}", file=sys.stderr)
    write_part(chosen.to, "reached", rows, " ".join(["python -P -m benchmarks.trust.reached", *sys.argv[1:]]))


def reached(what: str, count: int, seed: int) -> Row:
    """One reader: its statements, and how many of them were reached."""
    import coverage

    target = next(t for t in TARGETS if t.what == what)
    files = [PACKAGE / f for f in FILES[what]]
    watch = coverage.Coverage(data_file=None, include=[str(f) for f in files], config_file=False)
    watch.start()
    run(target, seed, count)
    watch.stop()
    wanted = hit = 0
    missed: list[str] = []
    for file in files:
        _, statements, _, missing, _ = watch.analysis2(str(file))
        inside = reading_lines(file.read_text(encoding="utf-8"))
        mine = [line for line in statements if line in inside]
        gone = [line for line in missing if line in inside]
        wanted, hit = wanted + len(mine), hit + len(mine) - len(gone)
        missed += [f"{file.relative_to(PACKAGE)}:{line}" for line in gone]
    note = f"{count:,} inputs; not reached: {', '.join(missed) or 'none'}"
    return Row(f"statements of the readers of {what} that fuzzed inputs reach", wanted, hit, wanted - hit, (note,))


def reading_lines(source: str) -> set[int]:
    """Lines inside functions that read: nothing at the top of a file, no function that writes or collects."""
    found: set[int] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.ClassDef):
                continue
            if isinstance(child, ast.ClassDef):
                waiting.append(child)
            elif not _OTHERS.search(child.name):
                found |= {n.lineno for part in child.body for n in ast.walk(part) if isinstance(n, ast.stmt)}
    return found


if __name__ == "__main__":
    main()
