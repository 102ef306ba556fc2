"""Recipes in mergekit's YAML dialect, for the methods that both tools know; each means here what it means there.

mergekit merges whole weights, W0 + D for ``base+adapter``. What is a function of the deltas D alone is done here; what is not
(a walk between whole weights) is refused, and so is everything that mergekit itself would stop at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plait.border.checked import Record
from plait.disk.files import text_of
from plait.errors import InputError, UsageError
from plait.merging.mergekit_methods import METHODS, MergekitRecipe, Model, refuse_end
from plait.merging.spec import MergeSpec
from plait.options import did_you_mean

_KNOWN = ("models", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "name")
_DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")


def read_mergekit_config(path: Path, rest: MergeSpec | None = None) -> tuple[list[str], MergeSpec]:
    """Read a mergekit recipe: the adapters' folders, and how they are merged.

    Every model is ``base+adapter`` or the base itself, and the bases must be one. mergekit's defaults apply where the
    recipe is silent. What plait would do otherwise (a gradient of weights over layers, slices, densities that differ
    between models, methods that walk between whole weights) is an error, never ignored.

    Args:
        path: The YAML file.
        rest: What a recipe does not say: rank, seed, device and so on.

    Raises:
        InputError: Not YAML, or not a mapping.
        UsageError: Something that plait does not do, or that mergekit refuses; the message names it.
    """
    from plait.border.yaml_text import load_foreign_yaml

    raw = load_foreign_yaml(text_of(path), str(path))
    if not isinstance(raw, dict):
        raise InputError("not a mapping", where=str(path), hint="expected a mergekit recipe")
    try:
        return from_mergekit(raw, rest)
    except UsageError as e:
        raise UsageError(e.what, where=f"{path}{': ' + e.where if e.where else ''}", hint=e.hint) from None


def from_mergekit(recipe: Mapping[str, Any], rest: MergeSpec | None = None) -> tuple[list[str], MergeSpec]:
    """Read a recipe that is parsed already; see `read_mergekit_config`."""
    record = Record.of(dict(recipe), "", inside="the recipe", kind=UsageError)
    for section in ("slices", "modules"):
        if section in recipe:
            raise UsageError(f"{section} put layers of several models together, which adapters cannot", where=section)
    for key in recipe:
        if key not in _KNOWN:
            raise UsageError(f"unknown key {key!r}", hint=did_you_mean(key, _KNOWN))
    for key in ("dtype", "out_dtype"):
        if record.has(key):
            record.text(key, choices=_DTYPES)
    name = record.text("merge_method")
    if name not in METHODS:
        raise UsageError(f"merge_method {name!r} is not one that plait shares", hint=did_you_mean(name, METHODS))
    base_model = record.text("base_model") if record.has("base_model") else None
    models = _models(recipe.get("models"))
    if base_model and any(m.folder and f"{m.base}+{m.folder}" == base_model for m in models):
        refuse_end(name, base_model)
    bases = {m.base for m in models} | ({base_model} if base_model else set())
    if len(bases) > 1:
        raise UsageError(
            f"adapters of different bases: {', '.join(sorted(bases))}",
            where="models",
            hint="every model is base+adapter with one base, and base_model that base alone",
        )
    shared = _parameters(recipe.get("parameters"), "parameters", METHODS[name].parameters, name)
    own = [Model(m.base, m.folder, _parameters(m.parameters, f"models[{i}]", METHODS[name].parameters, name))
           for i, m in enumerate(models)]  # fmt: skip
    read = MergekitRecipe(name, base_model, tuple(own), shared)
    if METHODS[name].needs_base and base_model is None:
        raise UsageError(f"{name} needs a base_model in mergekit", hint=f"base_model: {next(iter(bases))}")
    if not any(m.folder for m in own):
        raise UsageError("no model is base+adapter", where="models")
    said = METHODS[name].meaning(read)
    spec = replace(
        rest or MergeSpec(),
        method=said.method,
        options=said.options,
        weights=said.weights,
        scale=said.scale,
        base=next(iter(bases)),
    )
    return [m.folder for m in own if m.folder], spec


def _models(models: Any) -> list[Model]:
    """Every model as written; one without an adapter must be the base, whose delta is zero."""
    if not isinstance(models, list) or not models:
        raise UsageError("models is not a list", where="models")
    found: list[Model] = []
    for i, entry in enumerate(models):
        where = f"models[{i}]"
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("model"), str)
            or set(entry) - {"model", "parameters"}
        ):
            raise UsageError("expected model: base+adapter, and parameters", where=where)
        base, _, adapter = entry["model"].partition("+")
        if any((m.base, m.folder) == (base, adapter) for m in found):
            raise UsageError(f"{entry['model']!r} is listed twice, which mergekit refuses", where=where)
        found.append(Model(base, adapter, entry.get("parameters") or {}))
    bases = {m.base for m in found if m.folder}
    if whole := [m.base for m in found if not m.folder and bases and m.base not in bases]:
        raise UsageError(f"{whole[0]!r} is a whole model; plait merges adapters", where="models", hint="base+adapter")
    return found


def _parameters(raw: Any, where: str, known: Sequence[str], method: str) -> dict[str, float]:
    if raw is None:
        return {}
    record = Record.of(raw, "", inside=where, kind=UsageError)
    for key, value in record.values.items():
        if isinstance(value, list | dict):
            raise UsageError(
                f"{key} varies by layer or by filter, which plait does not do in a recipe",
                where=where,
                hint="one number; --weights FILE takes weights by module",
            )
        if key not in known:
            raise UsageError(
                f"plait has nothing like {key} of {method}", where=where, hint=f"known: {', '.join(known) or 'none'}"
            )
        if not isinstance(value, bool):
            record.number(key)
    return dict(record.values)
