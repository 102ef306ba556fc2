"""Recipes in mergekit's YAML dialect, for the methods that both tools know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.checked import LARGEST_NUMBER, shown
from plait.errors import InputError, UsageError
from plait.options import did_you_mean

_KNOWN = {"models", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "name"}
_FLAGS = {"normalize", "rescale", "int8_mask"}
_IGNORED = {"int8_mask", "dtype"}
# mergekit's method -> plait's, and the options that make it do what mergekit does by default.
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "ties": ("ties", {"scope": "module", "density": 1.0}),
    "dare_ties": ("dare_ties", {"density": 1.0, "agreeing": "sum"}),
    "dare_linear": ("dare_linear", {"density": 1.0}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.99, "gamma": 0.01}),
    "della": ("della", {"density": 0.5, "epsilon": 0.15}),
    "sce": ("sce", {"density": 1.0}),
    "slerp": ("slerp", {}),
    "multislerp": ("multi_slerp", {}),
    "karcher": ("karcher", {}),
}
# mergekit's parameter -> plait's option.
_OPTIONS = {
    "density": "density",
    "epsilon": "epsilon",
    "gamma": "gamma",
    "select_topk": "density",
    "t": "t",
    "max_iter": "steps",
    "tol": "tolerance",
}


def read_mergekit_config(path: Path) -> dict[str, Any]:
    """Read a mergekit recipe as arguments of `merge_folders`.

    Every model is ``base+adapter``: what is merged are the adapters, and the bases must be one. mergekit's defaults
    apply where the recipe is silent. What plait would do otherwise (a gradient of weights over layers, slices, densities
    that differ between models) is an error, never ignored.

    Returns:
        {"folders", "method", "options", "weights", "scale", "base"}.

    Raises:
        InputError: Not YAML, or not a mapping.
        UsageError: Something that plait does not do; the message names it.
    """
    import yaml

    from plait.recipe_file import YAML_ERRORS, DistinctKeys, text_of

    text = text_of(path)
    try:
        raw = yaml.load(text, Loader=DistinctKeys)  # noqa: S506 (a SafeLoader)
    except YAML_ERRORS as e:
        raise InputError("not YAML: " + " ".join(str(e).split()), where=str(path), hint="correct the file") from None
    if not isinstance(raw, dict):
        raise InputError("not a mapping", where=str(path), hint="expected a mergekit recipe")
    try:
        return from_mergekit(raw)
    except UsageError as e:
        raise UsageError(e.what, where=f"{path}{': ' + e.where if e.where else ''}", hint=e.hint) from None


def from_mergekit(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed recipe as arguments of `merge_folders`; see `read_mergekit_config`."""
    if "slices" in recipe:
        raise UsageError("slices put layers of several models together, which adapters cannot", where="slices")
    for key in recipe:
        if key not in _KNOWN:
            raise UsageError(f"unknown key {shown(key)}", hint=did_you_mean(shown(key), _KNOWN))
    name = recipe.get("merge_method")
    if not isinstance(name, str) or name not in _METHODS:
        hint = did_you_mean(shown(name).strip("'"), _METHODS)
        raise UsageError(f"merge_method {shown(name)} is not one that plait shares", hint=hint)
    method, defaults = _METHODS[name]
    models = _models(recipe.get("models"))
    shared = _parameters(recipe.get("parameters"), "parameters")
    folders = [adapter for _, adapter, _ in models]
    if not isinstance(recipe.get("base_model", ""), str):
        raise UsageError(
            f"base_model is {shown(recipe['base_model'])}, expected a name", hint="a folder, or a hub name"
        )
    bases = {base for base, _, _ in models} | ({str(recipe["base_model"])} if "base_model" in recipe else set())
    if len(bases) > 1:
        raise UsageError(f"adapters of different bases: {', '.join(sorted(bases))}", where="models")
    own = [parameters for _, _, parameters in models]
    merged: dict[str, Any] = {
        "folders": folders,
        "method": method,
        "options": {**defaults, **_options(shared, own, name)},
        "weights": [float(p.get("weight", shared.get("weight", 1.0))) for p in own],
        "scale": float(shared.get("lambda", 1.0)),
    }
    return merged | {"base": next(iter(bases))}


def _models(models: Any) -> list[tuple[str, str, dict[str, float]]]:
    """(base, adapter folder, parameters) of each model; a model that is the base alone stands for a zero delta."""
    if not isinstance(models, list) or not models:
        raise UsageError("models is not a list", where="models")
    found = []
    for i, entry in enumerate(models):
        where = f"models[{i}]"
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("model"), str)
            or set(entry) - {"model", "parameters"}
        ):
            raise UsageError("expected model: base+adapter, and parameters", where=where)
        base, plus, adapter = entry["model"].partition("+")
        if plus:
            found.append((base, adapter, _parameters(entry.get("parameters"), where)))
        elif entry.get("parameters"):
            raise UsageError(f"{base!r} is a whole model; plait merges adapters", where=where, hint="base+adapter")
    if not found:
        raise UsageError("no model is base+adapter", where="models")
    return found


def _parameters(raw: Any, where: str) -> dict[str, float]:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UsageError("not a mapping", where=where)
    for key, value in raw.items():
        if not isinstance(key, str):
            raise UsageError(f"a parameter is called {shown(key)}", where=where, hint="names are text")
        if isinstance(value, list | dict):
            raise UsageError(
                f"{key} varies by layer or by filter, which plait does not do", where=where, hint="one number"
            )
        if key in _FLAGS and value in (True, False):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_NUMBER:
            raise UsageError(f"{key} is {shown(value)}, expected a finite number", where=where, hint="one number")
    return dict(raw)


def _options(shared: Mapping[str, float], own: Sequence[Mapping[str, float]], name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in sorted({*shared, *(k for p in own for k in p)} - _IGNORED - {"weight", "lambda"}):
        values = {p.get(key, shared.get(key)) for p in own}
        if len(values) > 1:
            raise UsageError(
                f"{key} differs between the models: {sorted(map(str, values))}", where="models", hint="one for all"
            )
        value = values.pop()
        if key == "normalize":
            found |= _normalised(name, bool(value))
        elif key == "rescale" and bool(value) == name.startswith(("dare", "della")):
            continue
        elif key not in _OPTIONS:
            raise UsageError(f"plait has nothing like {key} of {name}", where="parameters")
        else:
            found[_OPTIONS[key]] = value
    return found


def _normalised(name: str, normalise: bool) -> dict[str, Any]:
    """What normalize means: the mean of the entries that agree, or their sum; the mean of the deltas."""
    if name in ("ties", "dare_ties"):
        return {"agreeing": "mean" if normalise else "sum"}
    if normalise == (name in ("linear", "della", "sce", "multislerp")):
        return {}
    raise UsageError(f"normalize: {str(normalise).lower()} of {name} is not one that plait shares", where="parameters")
