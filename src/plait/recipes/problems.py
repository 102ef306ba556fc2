"""What is wrong with a recipe: all of it at once, each with what was expected and the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import BaseModel as PydanticModel
from pydantic import ValidationError

from plait.border.checked import shown
from plait.errors import UsageError, printable
from plait.options import Configurable, checked_options, did_you_mean, require_known
from plait.recipes import sections as models
from plait.recipes.other_names import suggestion
from plait.recipes.recipe import CHOOSING, Recipe, Settings, at_each_rate
from plait.recipes.sections import ArmSpec, MergeSpec, TaskSpec

M = TypeVar("M", bound=PydanticModel)
MOST = 8  # problems that are told
_LONGEST = 1800  # characters of a message that tells several

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


def require_none(problems: Sequence[UsageError], where: str) -> None:
    """Raise what is wrong: a single problem as it is, several as one error that numbers them.

    Raises:
        UsageError: There is a problem.
    """
    told = list({str(p): p for p in problems}.values())
    if not told:
        return
    if len(told) == 1:
        told[0].where = told[0].where or where
        raise told[0]
    each = [_inside(p, where) for p in told[:MOST]]
    more = f", the first {MOST}" if len(told) > MOST else ""
    error = UsageError(
        f"{len(told)} problems{more}: " + "; ".join(f"({i}) {text}" for i, text in enumerate(each, start=1)),
        where=where,
    )
    error.longest = _LONGEST
    raise error


def _inside(problem: UsageError, where: str) -> str:
    place = f"{problem.where}: " if problem.where not in (None, where) else ""
    return f"{place}{problem.what}" + (f" ({problem.hint})" if problem.hint else "")


def of_form(error: ValidationError, model: type[PydanticModel], where: str) -> list[UsageError]:
    """What does not have the form of a recipe, or of settings: unknown keys, wrong types, values out of range."""
    found: list[dict[str, Any]] = [dict(e) for e in error.errors()]
    names = {e["loc"][:-1]: e["input"] for e in found if e["loc"] and e["loc"][-1] == "str"}  # a name, or a mapping
    told = []
    for e in found:
        either = next((loc for loc in names if e["loc"][: len(loc)] == loc), None)
        if either is None or (isinstance(names[either], Mapping) and e["loc"][-1] != "str"):
            told.append(e)
        elif e["loc"][-1] == "str" and not isinstance(names[either], Mapping):
            told.append({**e, "msg": "expected a name, or a mapping"})
    return [UsageError(text, where=where) for text in dict.fromkeys(_problem(e, model) for e in told)]


def _problem(error: Mapping[str, Any], whole: type[PydanticModel]) -> str:
    place = [str(p) for p in error["loc"] if not _is_of_pydantic(str(p))]
    if error["type"] == "extra_forbidden":
        known = sorted(_fields_at(place[:-1], whole))
        near = difflib.get_close_matches(place[-1], known, n=1)
        other = suggestion(place[-1])
        advice = f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}" if known else ""
        return f"unknown key {printable('.'.join(place), 80)!r}" + (f", here it is {other}" if other else advice)
    own = error["type"] == "value_error"  # a check of plait's, in its own words
    told = error["ctx"]["error"] if own else error["msg"]
    # What is wrong in a whole section is how its keys go together: all of it is no answer to what was found.
    shows = place and not (own and isinstance(error.get("input"), Mapping))
    found = f" (found {printable(shown(error.get('input')), 60)})" if shows else ""
    return f"{printable('.'.join(place), 80) or 'recipe'}: {told}{found}"


def _is_of_pydantic(part: str) -> bool:
    """Whether a part of a place names a class or a check of pydantic's, not a key or a number of the recipe."""
    return part.endswith("Spec") or part.startswith("function-") or part in ("str", "list[constrained-str]")


def _fields_at(place: Sequence[str], whole: type[PydanticModel]) -> set[str]:
    model: type[PydanticModel] | None = whole if not place else _SECTIONS.get(place[0])
    return set(model.model_fields) if model else set()


def of_names(recipe: Recipe, where: str) -> Iterator[UsageError]:
    """What only the registries know: methods, their options, training keys."""
    for task in recipe.tasks:
        yield from _of_task(task, where)
    for arm in recipe.arm_specs:
        yield from _of_arm(arm, where)
        yield from _of_others(recipe, arm, where)
        yield from of_training(recipe, arm, where)
    for m in recipe.merge_specs:
        yield from _of_merge(m, where)
        yield from _of_needs(recipe, m, where)


def of_parts(raw: Mapping[str, Any], where: str) -> Iterator[UsageError]:
    """The same of a recipe whose form is wrong somewhere: of those of its entries that have the right form."""
    for task in _entries(raw.get("tasks"), TaskSpec):
        yield from _of_task(task, where)
    for one in _entries(raw.get("arms"), ArmSpec):
        arm = ArmSpec.model_construct(name=one) if isinstance(one, str) else one
        yield from _of_arm(arm, where)
        yield from _of_keys(arm.training, where)
    for merge in _entries(raw.get("merges"), MergeSpec):
        yield from _of_merge(MergeSpec.model_construct(name=merge) if isinstance(merge, str) else merge, where)
    if isinstance(training := raw.get("training"), Mapping):
        yield from _of_keys(training, where)


def _entries(listed: Any, model: type[M]) -> Iterator[str | M]:
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, str):
            yield entry
            continue
        try:
            yield model.model_validate(entry)
        except ValidationError:  # told by its form
            continue


def of_settings(settings: Settings, where: str) -> Iterator[UsageError]:
    """What is wrong with the tasks and the training of a single stage."""
    for task in settings.tasks:
        yield from _of_task(task, where)
    yield from of_training(settings, None, where)
    if bool(settings.training.get("evaluate_every")) != (settings.data.selection_rows is not None):
        yield UsageError(CHOOSING, where=where)


def _of_task(task: str | TaskSpec, where: str) -> Iterator[UsageError]:
    from plait.tasks.glue import GLUE_TASKS
    from plait.tasks.metrics import METRICS, METRICS_OF

    if isinstance(task, str):
        hint = "GLUE's names stand alone; a task of your own is {name: ..., train: ..., text: ...}"
        yield from _unknown(task, GLUE_TASKS, "task", where, otherwise=hint)
        return
    for metric in task.metrics or []:
        yield from _unknown(metric, METRICS, "metric", where)
        if metric in METRICS and metric not in METRICS_OF[task.kind]:
            hint = f"one of {', '.join(METRICS_OF[task.kind])}"
            yield UsageError(f"metric {metric!r} does not score {task.kind}", where=f"task {task.name}", hint=hint)


def _of_arm(arm: ArmSpec, where: str) -> Iterator[UsageError]:
    from plait.subspaces.listed import subspace_list

    methods = subspace_list()
    yield from _unknown(arm.method, list(methods), "subspace method", where)
    if arm.method in methods:
        yield from _of_options(methods[arm.method], arm.options, where, f"arm {arm.name}")


def _of_others(recipe: Recipe, arm: ArmSpec, where: str) -> Iterator[UsageError]:
    from plait.subspaces.listed import subspace_list

    others = len(recipe.tasks) - 1
    method = subspace_list().get(arm.method)
    if method and "others" in method.needs and not others:
        yield UsageError(f"arm {arm.name!r} looks at the other tasks, and there is only one", where=where)
    if arm.known is not None and arm.known > others:
        yield UsageError(f"known {arm.known}, there are {others} others", where=f"arm {arm.name}")


def _of_merge(m: MergeSpec, where: str) -> Iterator[UsageError]:
    from plait.merging.listed import CALIBRATIONS, merge_list

    methods = merge_list()
    yield from _unknown(m.merge_method, list(methods), "merge method", where)
    if m.merge_method in methods:
        yield from _of_options(methods[m.merge_method], m.options, where, f"merge {m.name}")
    if m.calibrate is not None:
        yield from _unknown(m.calibrate, list(CALIBRATIONS), "calibration", where)


def _of_needs(recipe: Recipe, m: MergeSpec, where: str) -> Iterator[UsageError]:
    """What a merge reads and the run does not collect."""
    from plait.merging.listed import merge_list

    method = merge_list().get(m.merge_method)
    if method and "output_gradients" in method.needs and not recipe.statistics.output_gradients:
        hint = "statistics: {output_gradients: true}"
        yield UsageError(f"merge {m.name!r} needs output gradients", where=where, hint=hint)
    if method and "fisher" in method.needs:
        hint = "plait stats fisher and plait merge --method fisher, by hand"
        yield UsageError(f"merge {m.name!r} needs Fisher files, which runs do not collect", where=where, hint=hint)


def _of_keys(training: Mapping[str, Any], where: str) -> Iterator[UsageError]:
    for key in training:
        other = suggestion(key)
        if other and key not in training_keys():
            yield UsageError(f"unknown training key {printable(key, 60)!r}", where=where, hint=f"here it is {other}")
        else:
            yield from _unknown(key, training_keys(), "training key", where)


def of_training(settings: Settings, arm: ArmSpec | None, where: str) -> Iterator[UsageError]:
    """What is wrong with the training of an arm, or of a single adapter."""
    from plait.subspaces.listed import subspace_list

    if wrong := list(_of_keys({**settings.training, **(arm.training if arm else {})}, where)):
        yield from wrong
        return
    try:
        training = (settings.training_of(a) for a in at_each_rate(settings, arm or ArmSpec(name="adapter")))
        span = next(training).constraint_options.get("method")
    except UsageError as e:
        who = f"training of arm {arm.name}" if arm and arm.training else "training"
        yield UsageError(f"{who}: {e.what}", where=where, hint=e.hint)
        return
    methods = subspace_list()
    if method := span or (arm.method if arm else None):
        yield from _unknown(method, list(methods), "subspace method", where)
    if span is not None and span in methods and "weights" in methods[span].needs:
        yield UsageError(
            f"a span to stay in is taken from statistics alone, and {span!r} reads the base's weights",
            where=where,
            hint="constraint_options.method: contrastive or osrm",
        )


def _of_options(method: Configurable, options: Mapping[str, Any], where: str, what: str) -> Iterator[UsageError]:
    """What is wrong with the options of a method, values and all, before anything is computed with them."""
    unknown = [o for o in options if o not in method.options]
    for option in unknown:
        yield from _unknown(option, list(method.options), f"option of {method.name}", where)
    if unknown:
        return
    try:
        checked_options(method, options)
    except UsageError as e:
        hint = e.hint or "plait ls merges, or subspaces, shows what is allowed"
        yield UsageError(f"{what}: {e.what}", where=where, hint=hint)


def _unknown(
    name: str, known: Sequence[str], what: str, where: str, *, otherwise: str | None = None
) -> Iterator[UsageError]:
    try:
        require_known(name, known, what, where)
    except UsageError as e:
        near = did_you_mean(name, known).startswith("did you mean")
        yield e if near or otherwise is None else UsageError(e.what, where=where, hint=otherwise)


def training_keys() -> list[str]:
    """What `training` may hold: the fields of `TrainingSettings`, but max_length, which `data` sets for every stage."""
    from plait.training.settings import TrainingSettings

    return [f.name for f in fields(TrainingSettings) if f.name != "max_length"]
