"""Sums of adapters, baking, and looking at files: whole commands, verified and flushed as they are by default."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.speed import inputs
from benchmarks.speed.measuring import Case, Command

_FLOORS = str(Path(__file__).with_name("floors.py"))


def cases(work: Path) -> list[Case]:
    """Everything here; inputs are made where they are missing."""
    return [*_small(work), *_large(work), *_files(work), *_bake(work), *_looking(work)]


def _floor(*arguments: object) -> Command:
    return [sys.executable, _FLOORS, *map(str, arguments)]


def _small(work: Path) -> list[Case]:
    out = work / "out"
    rob = inputs.peft_folders(work / "rob", 8, inputs.roberta_large(), 8, "float32", "roberta-large", None)
    command = ["merge", *map(str, rob), "--method", "task_arithmetic", "--out", str(out), "--json"]
    numpy_only = _floor("sum", out, *rob)
    return [
        Case("sum of 8 adapters, RoBERTa-large r8 q+v, float32", command, "the same by NumPy alone", numpy_only, (out,), 2.5, 80, repeats=7)
    ]  # fmt: skip


def _llama(work: Path) -> list[Path]:
    shapes = inputs.llama(32, 4096, 14336, 1024)
    return inputs.peft_folders(work / "la", 8, shapes, 16, "bfloat16", "llama-3-8b", "CAUSAL_LM")


def _cat(files: list[Path], out: Path) -> Command:
    return ["sh", "-c", 'out=$1; shift; cat "$@" > "$out"; sync "$out"', "sh", str(out), *map(str, files)]


def _large(work: Path) -> list[Case]:
    out, la = work / "out", _llama(work)
    reference = _cat([p / "adapter_model.safetensors" for p in la], out)
    beside = "cat of the inputs into one flushed file"
    found = []
    for method in ("task_arithmetic", "cat"):
        command = ["merge", *map(str, la), "--method", method, "--out", str(out), "--json"]
        what = f"{method} of 8 adapters, Llama-3-8B r16 all linear, bfloat16"
        found.append(Case(what, command, beside, reference, (out,), 3.5, 800))
    return found


def _files(work: Path) -> list[Case]:
    out = work / "out.safetensors"
    files = inputs.kohya_files(work / "sdxl", 8, inputs.sdxl(), 32)
    command = ["merge", *map(str, files), "--method", "task_arithmetic", "--out", str(out), "--json"]
    beside = "cat of the inputs into one flushed file"
    return [Case("sum of 8 files, kohya SDXL r32, float16", command, beside, _cat(files, out), (out,), None, 1500)]


def _bake(work: Path) -> list[Case]:
    base, out = inputs.llama_base(work / "base"), work / "out"
    shapes = inputs.llama(22, 2048, 5632, 256)
    pair = inputs.peft_folders(work / "pair", 2, shapes, 16, "bfloat16", str(base), "CAUSAL_LM")
    command = [
        "merge",
        *map(str, pair),
        "--method",
        "task_arithmetic",
        "--bake",
        str(base),
        "--out",
        str(out),
        "--json",
    ]
    copy = ["sh", "-c", 'cp -r "$1" "$2"; sync "$2"/*', "sh", str(base), str(out)]
    what = "2 adapters, all linear r16, baked into 1.1 B in bfloat16"
    return [Case(what, command, "copying the base, flushed", copy, (out,), 4, 700)]


def _looking(work: Path) -> list[Case]:
    shapes = inputs.llama(32, 4096, 14336, 1024)
    wide = inputs.peft_folders(work / "wide", 1, shapes, 256, "bfloat16", "llama-3-8b", "CAUSAL_LM")[0]
    header = _floor("header", wide / "adapter_model.safetensors")
    python: Command = [sys.executable, "-c", "pass"]
    recipe = str(Path(__file__).parents[2] / "recipes" / "glue8-minilm.yaml")
    what, command = "inspect an adapter of 1.3 GB", ["inspect", str(wide), "--json"]
    found = [
        Case(what, command, "reading its header", header, (), None, 120),
        Case(f"{what}, every number", [*command, "--full"], "reading its header", header, (), None, 120, repeats=1),
    ]
    for what, command in (
        ("help", ["--help"]),
        ("list merging methods", ["ls", "merges"]),
        ("list everything", ["ls"]),
        ("validate a recipe", ["validate", recipe]),
        ("a typing error", ["merge", "a", "b", "--metod", "ties", "--out", "x"]),
        ("a mistyped method", ["merge", "a", "b", "--method", "tiez", "--out", "x"]),
    ):
        whole = ["sh", "-c", '"$@"; test $? = 2 -o $? = 0', "sh", sys.executable, "-P", "-m", "plait", *command]
        case = Case(what, whole, "python -c pass", python, (), None, 120, repeats=5, whole=True, by="cpu")
        found.append(case)
    return found
