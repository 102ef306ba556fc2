"""Reading a recipe: safe YAML, overrides, and errors that name the key and the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel as PydanticModel
from pydantic import ValidationError

from plait.border.checked import Json, shown
from plait.border.yaml_text import load_yaml as load_yaml
from plait.disk.files import text_of as text_of
from plait.disk.store import staged_file
from plait.errors import InputError, UsageError, printable
from plait.options import Configurable, checked_options
from plait.options import require_known as require_known
from plait.runs import sections as models
from plait.runs.recipe import Recipe, Settings, at_each_rate
from plait.runs.sections import ArmSpec, TaskSpec

_EXCLUDES = {"training.steps": "epochs", "training.epochs": "steps"}  # an override of one leaves the other out


_SECTIONS: dict[str, type[PydanticModel]] = {
    "base": models.BaseSpec,
    "data": models.DataSpec,
    "tasks": models.TaskSpec,
    "lora": models.LoraSpec,
    "statistics": models.StatisticsSpec,
    "arms": models.ArmSpec,
    "merges": models.MergeSpec,
    "evaluation": models.EvaluationSpec,
    "background": models.TaskSpec,
    "repair": models.Repair,
    "variants": models.Variant,
}


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: A YAML file.
        overrides: "dotted.key=value" strings; values are YAML.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in shipped_recipes()], n=1, cutoff=0.4)
        raise InputError(
            "no such recipe", where=str(path), hint=f"plait cp {near[0]} ." if near else "plait ls recipes"
        )
    raw = load_yaml(text_of(path), str(path))
    if not isinstance(raw, dict):
        raise UsageError("a recipe is a mapping of keys", where=str(path))
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
        UsageError: Every wrong key, at most eight, with what was expected and the nearest right name.
    """
    try:
        recipe = Recipe.model_validate(raw)
        variants = [variant_of(recipe, v.name) for v in recipe.variants]
    except ValidationError as e:
        raise UsageError(problems_of(e, Recipe), where=where) from None
    for one in (recipe, *variants):
        check_names(one, where)
    for arm in recipe.arm_specs:
        if arm.known is not None and arm.known >= len(recipe.tasks):
            raise UsageError(f"known {arm.known}, there are {len(recipe.tasks) - 1} others", where=f"arm {arm.name}")
    return recipe


def parse_settings(raw: Mapping[str, Any], where: str) -> Settings:
    """Check what a single stage is told, already parsed.

    Raises:
        UsageError: As `parse_recipe`.
    """
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as e:
        raise UsageError(problems_of(e, Settings), where=where) from None
    _check_tasks(settings, where)
    _check_training(settings, None, where)
    return settings


def variant_of(recipe: Recipe, name: str) -> Recipe:
    """The recipe that a variant is: its settings changed, its arms, no variants or references of its own."""
    variant = next(v for v in recipe.variants if v.name == name)
    raw = recipe.model_dump(mode="json", exclude={"variants", "repair"})
    for key, value in variant.set.items():
        put(raw, key, value, f"variant {name}: {key}")
    for arm in raw["arms"]:
        if isinstance(arm, dict):
            arm["rates"] = None
    changed = Recipe.model_validate(raw)
    named = set(variant.arms)
    named |= {a.like for a in recipe.arm_specs if a.name in variant.arms and a.like}
    arms = [a for a in changed.arms if (a if isinstance(a, str) else a.name) in named]
    merges = [m for m in changed.merge_specs if variant.merges is None or m.name in variant.merges]
    return changed.model_copy(update={"arms": arms, "merges": merges, "seeds": variant.seeds or recipe.seeds[:1]})


def problems_of(error: ValidationError, model: type[PydanticModel]) -> str:
    """What is wrong with a recipe (or a study), at most eight things, each with the nearest right name."""
    return "; ".join(dict.fromkeys(_problem(dict(found), model) for found in error.errors()[:8]))


def _problem(error: Mapping[str, Any], whole: type[PydanticModel]) -> str:
    place = [str(p) for p in error["loc"] if not str(p).endswith("Spec") and p != "str"]
    if error["type"] == "extra_forbidden":
        known = sorted(_fields_at(place[:-1], whole))
        near = difflib.get_close_matches(place[-1], known, n=1)
        advice = f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}" if known else ""
        return f"unknown key {printable('.'.join(place), 80)!r}{advice}"
    found = printable(shown(error.get("input")), 60)
    return f"{printable('.'.join(place), 80) or 'recipe'}: {error['msg']}" + (f" (found {found})" if place else "")


def _fields_at(place: Sequence[str], whole: type[PydanticModel]) -> set[str]:
    model: type[PydanticModel] | None = whole if not place else _SECTIONS.get(place[0])
    return set(model.model_fields) if model else set()


def check_names(recipe: Recipe, where: str) -> None:
    """Check what only the registries know: methods, their options, training overrides."""
    from plait.merging import merge_methods
    from plait.merging.calibration import CALIBRATIONS
    from plait.subspaces import subspace_methods

    _check_tasks(recipe, where)
    for arm in recipe.arm_specs:
        require_known(arm.method, list(subspace_methods()), "subspace method", where)
        method = subspace_methods()[arm.method]
        _check_options(method, arm.options, where, f"arm {arm.name}")
        if "others" in method.needs and len(recipe.tasks) < 2:
            raise UsageError(f"arm {arm.name!r} looks at the other tasks, and there is only one", where=where)
        _check_training(recipe, arm, where)
    for m in recipe.merge_specs:
        require_known(m.merge_method, list(merge_methods()), "merge method", where)
        _check_options(merge_methods()[m.merge_method], m.options, where, f"merge {m.name}")
        if m.calibrate is not None:
            require_known(m.calibrate, list(CALIBRATIONS), "calibration", where)


def _check_tasks(settings: Settings, where: str) -> None:
    from plait.tasks import GLUE_TASKS, METRICS
    from plait.tasks.metrics import METRICS_OF

    for task in settings.tasks:
        if isinstance(task, str):
            require_known(task, GLUE_TASKS, "task", where)
        for metric in (task.metrics or []) if isinstance(task, TaskSpec) else []:
            require_known(metric, METRICS, "metric", where)
            if isinstance(task, TaskSpec) and metric not in METRICS_OF[task.kind]:
                hint = f"one of {', '.join(METRICS_OF[task.kind])}"
                raise UsageError(f"metric {metric!r} does not score {task.kind}", where=f"task {task.name}", hint=hint)


def _check_training(settings: Settings, arm: ArmSpec | None, where: str) -> None:
    from plait.subspaces import subspace_methods

    for key in {**settings.training, **(arm.training if arm else {})}:
        require_known(key, training_keys(), "training key", where)
    try:
        training = (settings.training_of(a) for a in at_each_rate(settings, arm or ArmSpec(name="adapter")))
        method = next(training).constraint_options.get("method", arm.method if arm else None)
    except UsageError as e:
        who = f"training of arm {arm.name}" if arm else "training"
        raise UsageError(f"{who}: {e.what}", where=where, hint=e.hint) from None
    if method is not None:
        require_known(method, list(subspace_methods()), "subspace method", where)


def _check_options(method: Configurable, options: Mapping[str, Any], where: str, what: str) -> None:
    """Check the options of a method, values and all, before anything is computed with them."""
    for option in options:
        require_known(option, list(method.options), f"option of {method.name}", where)
    try:
        checked_options(method, options)
    except UsageError as e:
        raise UsageError(
            f"{what}: {e.what}", where=where, hint=e.hint or "plait ls methods shows what is allowed"
        ) from None


def training_keys() -> list[str]:
    """What `training` may hold: the fields of `TrainingSettings`, but max_length, which `data` sets for every stage."""
    from plait.training.settings import TrainingSettings

    return [f.name for f in fields(TrainingSettings) if f.name != "max_length"]


STUDIES = "studies"


def shipped_recipes(under: str = "") -> list[Path]:
    """The recipes that come with plait, by name; those of studies under `STUDIES`."""
    here = Path(__file__).parents[1]
    folder = here / "_recipes"
    return sorted((folder if folder.is_dir() else here.parents[1] / "recipes").joinpath(under).glob("*.yaml"))


def find_recipe(given: Path) -> Path:
    """A recipe's path: the file itself, or the shipped recipe of that name; of a study ``studies/NAME``."""
    under = str(given.parent) if str(given.parent) == STUDIES else ""
    shipped = {p.name: p for p in shipped_recipes(under)}
    name = given.name if given.suffix == ".yaml" else f"{given.name}.yaml"
    if given.exists() or (len(given.parts) > 1 and not under):
        return given
    return shipped.get(name, given)


def find_study(given: Path) -> Path:
    """A study's path: the file itself, or the shipped study of that name, with ``studies/`` or without."""
    bare = not given.exists() and len(given.parts) == 1
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
