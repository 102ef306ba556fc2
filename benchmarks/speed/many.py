"""Many adapters: advice from factors, spectral methods on 64 small ones, elementwise methods on eight of an 8 B model."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.speed import inputs
from benchmarks.speed.measuring import Case

_TORCH = [sys.executable, "-c", "import torch"]
_BESIDE = "python -c 'import torch'"


def cases(work: Path) -> list[Case]:
    """Everything here; inputs are made where they are missing."""
    return [*_advice(work), *_spectral(work), *_elementwise(work)]


def _small(work: Path, count: int) -> list[str]:
    shapes = inputs.roberta_large()
    return [str(p) for p in inputs.peft_folders(work / "rob", count, shapes, 8, "float32", "roberta-large", None)]


def _large(work: Path) -> list[str]:
    shapes = inputs.llama(32, 4096, 14336, 1024, ("q_proj", "v_proj"))
    return [str(p) for p in inputs.peft_folders(work / "lqv", 8, shapes, 16, "bfloat16", "llama-3-8b", "CAUSAL_LM")]


def _advice(work: Path) -> list[Case]:
    many = [(n, f"advise, {n} adapters, RoBERTa-large r8 q+v", _small(work, n)) for n in (8, 16, 32)]
    many.append((8, "advise, 8 adapters, Llama-3-8B r16 q+v", _large(work)))
    return [Case(what, ["advise", *folders], _BESIDE, _TORCH, repeats=2, by="cpu") for _, what, folders in many]


def _merged(work: Path, method: str, folders: list[str], what: str) -> Case:
    out = work / "out"
    command = ["merge", *folders, "--method", method, "--out", str(out), "--json"]
    return Case(f"{method} of {len(folders)} adapters, {what}", command, _BESIDE, _TORCH, (out,), repeats=2, by="cpu")


def _spectral(work: Path) -> list[Case]:
    folders = _small(work, 64)
    return [_merged(work, m, folders, "RoBERTa-large r8 q+v") for m in ("knots", "tsv", "core_space", "iso_c")]


def _elementwise(work: Path) -> list[Case]:
    return [_merged(work, m, _large(work), "Llama-3-8B r16 q+v") for m in ("ties", "dare_ties")]
