"""Reading a recipe: safe YAML, overrides, and errors that name the key and the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from plait.border.checked import Json
from plait.border.yaml_text import load_yaml as load_yaml
from plait.disk.files import text_of as text_of
from plait.disk.store import staged_file
from plait.errors import InputError, UsageError, printable
from plait.options import require_known as require_known
from plait.recipes.other_names import own_key, understood
from plait.recipes.problems import of_form, of_names, of_parts, of_settings, require_none
from plait.recipes.recipe import Recipe, Settings
from plait.recipes.shipped import STUDIES as STUDIES
from plait.recipes.shipped import shipped_recipes as shipped_recipes

_EXCLUDES = {"training.steps": "epochs", "training.epochs": "steps"}  # an override of one leaves the other out


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: A YAML file.
        overrides: "dotted.key=value" strings; values are YAML.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in shipped_recipes()], n=1, cutoff=0.4)
        raise InputError(
            "no such recipe", where=str(path), hint=f"plait cp {near[0]} ." if near else "plait ls recipes"
        )
    raw = load_yaml(text_of(path), str(path))
    if not isinstance(raw, dict):
        raise UsageError("a recipe is a mapping of keys", where=str(path))
    raw = understood(raw, str(path))
    apply_overrides(raw, overrides)
    return parse_recipe(raw, str(path))


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply "dotted.key=value" strings to a raw recipe, in order."""
    for override in overrides:
        _override(raw, override)


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {printable(text)!r} is not key=value")
    key = own_key(key)
    put(raw, key, load_yaml(value, f"--set {key}"), f"--set {key}")
    if key in _EXCLUDES:
        *parents, _ = key.split(".")
        _inside(raw, parents, f"--set {key}").pop(_EXCLUDES[key], None)


def put(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set one value of a raw recipe.

    Args:
        raw: Changed in place.
        key: Dotted; in a list an entry is called by its name, as in "tasks.snli.template".
        value: What is put there.
        where: What an error names.

    Raises:
        UsageError: A part of the key is neither a mapping nor the name of an entry that is one.
    """
    *parents, last = key.split(".")
    _inside(raw, parents, where)[last] = value


def _inside(whole: Json, parents: Sequence[str], where: str) -> Json:
    """The mapping that a dotted key's parents lead to; missing ones are made."""
    place: Json | list[Any] = whole
    for parent in parents:
        if isinstance(place, list):
            entry = next((p for p in place if isinstance(p, dict) and p.get("name") == parent), None)
        else:
            entry = place.setdefault(parent, {})
        if not isinstance(entry, dict | list):
            raise UsageError(f"{where}: {parent} is not a mapping, nor an entry described under that name")
        place = entry
    if isinstance(place, list):
        raise UsageError(f"{where}: which entry of {parents[-1]}?", hint="its name, as in tasks.NAME.template")
    return place


def parse_recipe(raw: Mapping[str, Any], where: str) -> Recipe:
    """Check a recipe that is already parsed.

    Raises:
        UsageError: Everything that is wrong, at most eight things, with what was expected and the nearest right name.
    """
    raw = understood(raw, where)
    try:
        recipe = Recipe.model_validate(raw)
        variants = [variant_of(recipe, v.name, where) for v in recipe.variants]
    except ValidationError as e:
        require_none([*of_form(e, Recipe, where), *of_parts(raw, where)], where)
        raise
    require_none([problem for one in (recipe, *variants) for problem in of_names(one, where)], where)
    return recipe


def parse_settings(raw: Mapping[str, Any], where: str) -> Settings:
    """Check what a single stage is told, already parsed.

    Raises:
        UsageError: As `parse_recipe`.
    """
    raw = understood(raw, where)
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as e:
        require_none([*of_form(e, Settings, where), *of_parts(raw, where)], where)
        raise
    require_none(list(of_settings(settings, where)), where)
    return settings


def variant_of(recipe: Recipe, name: str, where: str = "the recipe") -> Recipe:
    """The recipe that a variant is: its settings changed, its arms, no variants or references of its own.

    Raises:
        UsageError: What it sets makes no recipe, or one without its arms.
    """
    variant = next(v for v in recipe.variants if v.name == name)
    place = f"{where}: variant {name}"
    raw = recipe.model_dump(mode="json", exclude={"variants", "repair"})
    for key, value in variant.set.items():
        put(raw, own_key(key), value, f"{place}: {printable(key, 80)}")
    for arm in raw["arms"] if isinstance(raw["arms"], list) else []:
        if isinstance(arm, dict):
            arm["rates"] = None
    try:
        changed = Recipe.model_validate(raw)
    except ValidationError as e:
        require_none(of_form(e, Recipe, place), place)
        raise
    named = set(variant.arms)
    named |= {a.like for a in recipe.arm_specs if a.name in variant.arms and a.like}
    arms = [a for a in changed.arms if (a if isinstance(a, str) else a.name) in named]
    if gone := sorted(named - {a if isinstance(a, str) else a.name for a in arms}):
        raise UsageError(f"what it sets leaves no arm {gone[0]!r}", where=place)
    merges = [m for m in changed.merge_specs if variant.merges is None or m.name in variant.merges]
    return changed.model_copy(update={"arms": arms, "merges": merges, "seeds": variant.seeds or recipe.seeds[:1]})


def find_recipe(given: Path) -> Path:
    """A recipe's path: the file itself, or the shipped recipe of that name.

    A study is ``studies/NAME``, or ``NAME`` where no recipe has that name.
    """
    under = str(given.parent) if str(given.parent) == STUDIES else ""
    shipped = {p.name: p for p in shipped_recipes(under)}
    name = given.name if given.suffix == ".yaml" else f"{given.name}.yaml"
    if given.is_file() or (len(given.parts) > 1 and not under):  # a folder of that name is no recipe, and hides none
        return given
    studies = {p.name: p for p in shipped_recipes(STUDIES)} if not under else {}
    return shipped.get(name) or studies.get(name, given)


def find_study(given: Path) -> Path:
    """A study's path: the file itself, or the shipped study of that name, with ``studies/`` or without."""
    bare = not given.is_file() and len(given.parts) == 1
    return find_recipe(Path(STUDIES) / given if bare else given)


def copy_recipe(name: str, to: Path) -> Path:
    """Copy a shipped recipe into a folder or to a file that does not exist yet."""
    source = find_recipe(Path(name))
    if not source.is_file():
        raise InputError("no such recipe", where=name, hint=f"one of {', '.join(p.stem for p in shipped_recipes())}")
    target = to / source.name if to.is_dir() else to
    with staged_file(target) as stage:
        stage.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return target
