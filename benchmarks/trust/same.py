"""Merges and cuts repeated with other threads, merges in other orders too: ``python -P -m benchmarks.trust.same --to FOLDER``."""

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

import peft
import torch
from benchmarks.trust import Row, row, write_part
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
from tests.panels import random_adapter
from tests.test_hub import write
from tests.tiny import save_model
from transformers import AutoModel

from plait.cli import main as main_of_plait
from plait.entry import SAME_PRODUCTS
from plait.model.base import BaseModel
from plait.statistics.files import write_statistics
from plait.statistics.moments import ModuleInfo, Moments, Statistics

_RANK = 5
_COLUMNS = 192  # of the base that is run; products of this size are split over threads
BY_TEXTS: Mapping[str, Sequence[str]] = {
    "featcal": ("--method", "featcal"),
    "regmean_pp": ("--method", "regmean_pp"),
    "adamerging": ("--method", "adamerging", "--set", "steps=20"),
    "merge auto with texts": ("auto", "--refine", "10"),
    "merge auto with texts, heads learnt": ("auto", "--refine", "0", "--no-fit", "--learn-heads"),
}
BY_WEIGHTS: Mapping[str, Sequence[str]] = {
    "extract --rank": ("extract", "TUNED", "--base", "BASE", "--rank", "16"),
    "extract --energy": ("extract", "TUNED", "--base", "BASE", "--energy", "0.5"),
    "extract --stats": ("extract", "TUNED", "--base", "BASE", "--rank", "16", "--stats", "STATS"),
    "convert --base of a DoRA": ("convert", "DORA", "--base", "BASE", "--rank", "16"),
}


def main() -> None:
    """Run every method, those that need statistics with them, and two cuts by statistics, and write the part's file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--only-texts", action="store_true", help="merges that run a base alone")
    parser.add_argument("--only-weights", action="store_true", help="cuts of whole weights alone")
    parser.add_argument("--base", type=Path, help="BERT that is run on texts, in place of a random one")
    parser.add_argument("--columns", type=int, default=_COLUMNS, help="of that random one")
    parser.add_argument("--methods", nargs="*", default=list(BY_TEXTS), help="of those that run a base")
    parser.add_argument("--width", type=int, default=384, help="of the modules: torch splits products of this size")
    chosen = parser.parse_args()
    os.environ.setdefault(*SAME_PRODUCTS)  # as the command does it; read at the first product
    rows: list[Row] = []
    if not chosen.only_texts and not chosen.only_weights:
        rows += [repeated(m, chosen.runs, chosen.width) for m in METHODS]
        rows += [repeated(m, chosen.runs, chosen.width, rank=_RANK) for m in ("tsv", "ties")]
    if not chosen.only_weights:
        rows += [by_texts(what, BY_TEXTS[what], chosen.runs, chosen.base or chosen.columns) for what in chosen.methods]
    if not chosen.only_texts:
        rows += of_weights(chosen.runs, max(chosen.width, chosen.columns))
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
        outcomes = _again(command, root / "out", runs)
    on = f" on {run.name}" if isinstance(run, Path) else "" if run == _COLUMNS else f" on {run} columns"
    return row(f"{what}{on}: runs with 1 and 2 threads: the same bytes", outcomes)


def _again(command: Sequence[str], out: Path, runs: int) -> list[str]:
    """A command that writes an adapter to a folder, in turns with 1 and 2 threads: what is other than after the first run."""
    outcomes, first = [], None
    for i in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        with threads(1 + i % 2), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            main_of_plait(list(command))
        result = files_of(out)
        first = first or result
        other = sorted(n for n in {*first, *result} if first.get(n) != result.get(n))
        outcomes.append(f"run {i} with {1 + i % 2} threads: other bytes in {', '.join(other)}" if other else "")
    return outcomes


def of_weights(runs: int, columns: int) -> list[Row]:
    """Cuts of whole weights to a rank: what `plait extract` takes out of a fine-tune, and `plait convert` out of a DoRA.

    The base is a random BERT of two layers. What training changed is a rotation's size: singular values that are alike but for
    rounding, so that last bits decide which directions come first.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        places = {name.upper(): root / name for name in ("base", "tuned", "dora", "stats")}
        save_model(places["BASE"], "bert", hidden_size=columns, intermediate_size=2 * columns)
        _rotated(places["BASE"], places["TUNED"])
        _dora(places["BASE"], places["DORA"])
        _statistics(places["BASE"], places["STATS"])
        rows = []
        for what, words in BY_WEIGHTS.items():
            command = [str(places.get(word, word)) for word in words]
            outcomes = _again([*command, "--out", str(root / "out")], root / "out", runs)
            rows.append(row(f"{what} on {columns} columns: runs with 1 and 2 threads: the same bytes", outcomes))
    return rows


def _layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layer." in n]


def _rotated(base: Path, out: Path) -> None:
    """A full fine-tune: every layer's weight plus a tenth of a matrix with orthonormal rows or columns."""
    model = AutoModel.from_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in _layers(model):
            tall = sorted(layer.weight.shape, reverse=True)
            Q = torch.linalg.qr(torch.randn(*tall, generator=generator))[0]
            layer.weight += 0.1 * (Q if Q.shape == layer.weight.shape else Q.T)
    model.save_pretrained(out)


def _dora(base: Path, out: Path) -> None:
    """A DoRA on every query and value, all that is trained moved at random."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], use_dora=True)
    model = peft.get_peft_model(AutoModel.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(out)


def _statistics(base: Path, out: Path) -> None:
    """Second moments of all layers' inputs."""
    generator, sites, modules = torch.Generator().manual_seed(3), {}, {}
    for name, layer in _layers(AutoModel.from_pretrained(base)):
        H = torch.randn(2 * layer.in_features, layer.in_features, generator=generator)
        sites[name] = Moments(len(H), H.sum(0), H.T @ H)
        modules[name] = ModuleInfo(name, (layer.out_features, layer.in_features), 1.0)
    write_statistics(out, Statistics(sites, modules))


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
