"""Merges repeated with other numbers of threads and in other orders: ``python -P -m benchmarks.trust.same --to FOLDER``."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.trust import Row, row, write_part
from tests.fidelity.conftest import random_adapter
from tests.merging.test_same_bytes import (
    METHODS,
    NAMES,
    PAIRS,
    files_of,
    measured,
    merged,
    saved,
    threads,
    written_statistics,
)
from tests.test_hub import write
from tests.tiny import save_model

from plait.cli import main as main_of_plait
from plait.entry import SAME_PRODUCTS
from plait.model.base import BaseModel

_RANK = 5
_COLUMNS = 192  # of the base that is run; products of this size are split over threads
BY_TEXTS: Mapping[str, Sequence[str]] = {
    "featcal": ("--method", "featcal"),
    "regmean_pp": ("--method", "regmean_pp"),
    "adamerging": ("--method", "adamerging", "--set", "steps=20"),
    "merge auto with texts": ("auto", "--refine", "10"),
    "merge auto with texts, heads learnt": ("auto", "--refine", "0", "--no-fit", "--learn-heads"),
}


def main() -> None:
    """Run every method, those that need statistics with them, and two cuts by statistics, and write the part's file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--only-texts", action="store_true", help="merges that run a base alone")
    parser.add_argument("--base", type=Path, help="BERT that is run on texts, in place of a random one")
    parser.add_argument("--columns", type=int, default=_COLUMNS, help="of that random one")
    parser.add_argument("--methods", nargs="*", default=list(BY_TEXTS), help="of those that run a base")
    parser.add_argument("--width", type=int, default=384, help="of the modules: torch splits products of this size")
    chosen = parser.parse_args()
    os.environ.setdefault(*SAME_PRODUCTS)  # as the command does it; read at the first product
    rows: list[Row] = []
    if not chosen.only_texts:
        rows += [repeated(m, chosen.runs, chosen.width) for m in METHODS]
        rows += [repeated(m, chosen.runs, chosen.width, rank=_RANK) for m in ("tsv", "ties")]
    rows += [by_texts(what, BY_TEXTS[what], chosen.runs, chosen.base or chosen.columns) for what in chosen.methods]
    for r in rows:
        print(f"{r.what}: {r.held} of {r.tried}", file=sys.stderr)
    write_part(chosen.to, "same", rows, " ".join(["python -P -m benchmarks.trust.same", *sys.argv[1:]]))


def by_texts(what: str, words: Sequence[str], runs: int, run: Path | int = _COLUMNS) -> Row:
    """A merge that runs a base on texts, each run against the first, the adapters in one order.

    The base is a BERT's folder, or a number of columns: then a random one of two layers.

    What is fitted front to back depends on the order in which rows are added up, so the order is a part of its identity.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root, texts = Path(scratch), Path(scratch) / "texts.txt"
        texts.write_text("".join(f"w{i} w{(7 * i) % 50} w{(3 * i) % 50}\n" for i in range(40)), encoding="utf-8")
        folder = (
            run
            if isinstance(run, Path)
            else save_model(root / "base", "bert", hidden_size=run, intermediate_size=2 * run)
        )
        base = BaseModel(str(folder), device="cpu")
        pair = [write(root / n, random_adapter(base, "bert", n, "classification", i)) for i, n in enumerate("ab")]
        told = [part for f in pair for part in ("--text", f"{f.name}={texts}")]
        kind, more = (words[:1], words[1:]) if words[0] == "auto" else ((), words)
        command = ["merge", *kind, base.name, *map(str, pair), *told, *more, "--out", str(root / "out")]
        outcomes, first = [], None
        for i in range(runs):
            shutil.rmtree(root / "out", ignore_errors=True)
            with threads(1 + i % 2), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                main_of_plait(command)
            result = files_of(root / "out")
            first = first or result
            other = sorted(n for n in {*first, *result} if first.get(n) != result.get(n))
            said = f"run {i} with {1 + i % 2} threads: other bytes in {', '.join(other)}" if other else ""
            outcomes.append(said if result else "nothing was written")
    on = f" on {run.name}" if isinstance(run, Path) else "" if run == _COLUMNS else f" on {run} columns"
    return row(f"{what}{on}: runs with 1 and 2 threads: the same bytes", outcomes)


def repeated(method: str, runs: int, width: int, rank: int | None = None) -> Row:
    """One method over one module and over thirty: each run against the first; with a rank, cut by moments of all modules."""
    outcomes = []
    for modules in (1, 30):  # a thread of its own for each module only where there is much to do
        with tempfile.TemporaryDirectory() as scratch:
            names = NAMES[: 2 if method in PAIRS else 3]
            trio = [saved(Path(scratch) / n, i, width=width, modules=modules) for i, n in enumerate(names)]
            measure = partial(
                written_statistics if rank else partial(measured, method=method), width=width, modules=modules
            )
            files = {folder.name: measure(folder, seed=i) for i, folder in enumerate(trio)}
            given = {"statistics": {n: f for n, f in files.items() if f} or None, "rank": rank}
            weights = dict(zip(trio, (1.0, 0.5, 2.0), strict=False))
            first = None
            for i in range(runs):
                order, threads = trio[i % len(trio) :] + trio[: i % len(trio)], 1 + i % 2
                result = merged(
                    order, Path(scratch) / "out", method, threads, weights=[weights[f] for f in order], **given
                )
                first = first or result
                other = sorted(n for n in {*first, *result} if first.get(n) != result.get(n))
                said = f"run {i} of {modules} modules with {threads} threads: other bytes in {', '.join(other)}"
                outcomes.append(said if other else "")
    what = f"{method}, cut to a rank by statistics" if rank else method
    return row(f"{what}: runs with 1 and 2 threads, in every order of the adapters: the same bytes", outcomes)


if __name__ == "__main__":
    main()
