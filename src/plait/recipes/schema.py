"""The JSON Schema of recipes: the models that check them, with the names that the registries hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from plait.border.checked import Json
from plait.border.yaml_text import load_yaml
from plait.errors import PlaitError
from plait.recipes.other_names import SAME
from plait.recipes.recipe import Recipe

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TITLE = "plait recipe"
_JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def recipe_schema() -> Json:
    """Make the JSON Schema of recipes: every key with its type, its default and what it is for.

    Names of subspace methods, merge methods and GLUE tasks are told as examples: other packages may add some. What PEFT calls
    the same thing is allowed, too.
    """
    from plait.merging import merge_methods
    from plait.subspaces import subspace_methods
    from plait.tasks import GLUE_TASKS

    schema: Json = Recipe.model_json_schema()
    whole = {"$schema": DRAFT, **schema, "title": _TITLE}
    training = _training()
    whole["properties"]["training"] |= training
    parts = whole["$defs"]
    parts["ArmSpec"]["properties"]["training"] |= training
    for section, model in (("lora", "LoraSpec"), ("base", "BaseSpec"), ("data", "DataSpec")):
        _also(parts[model], SAME[section])
    for key, names in (("arms", subspace_methods()), ("merges", merge_methods()), ("tasks", GLUE_TASKS)):
        whole["properties"][key]["examples"] = [list(names)]
    task = parts["TaskSpec"]["properties"]
    for key in ("text", "metrics"):  # one column may stand alone
        task[key] = {"anyOf": [{"type": "string"}, _without_title(task[key])], **_kept(task[key])}
    return whole


def is_schema(path: Path) -> bool:
    """Whether a file is one that `plait schema` wrote."""
    try:
        found = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except (PlaitError, OSError, UnicodeDecodeError):
        return False
    return isinstance(found, dict) and found.get("title") == _TITLE


def _training() -> Json:
    """The keys of `training`: the fields of `TrainingSettings` and what the Trainer calls them."""
    from plait.training.settings import CONSTRAINTS, PRECISIONS, SCHEDULES, TrainingSettings

    hints, allowed = (
        get_type_hints(TrainingSettings),
        {"schedule": SCHEDULES, "constraint": CONSTRAINTS, "precision": PRECISIONS},
    )
    described = _described(inspect.getdoc(TrainingSettings) or "")
    properties: Json = {}
    for f in fields(TrainingSettings):
        if f.name == "max_length":
            continue
        properties[f.name] = _type(hints[f.name])
        if f.name == "lr":
            properties["lr"] = {"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}]}
        if f.name in allowed:
            properties[f.name]["enum"] = list(allowed[f.name])
        properties[f.name]["description"] = described[f.name]
    schema: Json = {"properties": properties, "additionalProperties": False}
    _also(schema, SAME["training"])
    return schema


def _type(hint: Any) -> Json:
    """The JSON type of one of a dataclass's fields, None left out: a missing key says it."""
    origin, kinds = get_origin(hint), [k for k in get_args(hint) if k is not type(None)]
    if hint in _JSON_TYPES or (len(kinds) == 1 and kinds[0] in _JSON_TYPES and origin is not tuple):
        return {"type": _JSON_TYPES[hint if hint in _JSON_TYPES else kinds[0]]}
    return {"type": "array"} if origin is tuple else {"type": "object"} if origin is Mapping else {}


def _described(text: str) -> dict[str, str]:
    """Key -> what a docstring's list of arguments says of it; of one without indentation, which Python 3.13 takes away itself."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.partition("Args:")[2].splitlines():
        head, colon, rest = line.strip().partition(":")
        if colon and line.startswith(" " * 4) and line[4:5] != " ":
            names = [n.strip() for n in head.split(",")]
            found |= dict.fromkeys(names, rest.strip())
        elif line.strip():
            found |= {n: f"{found[n]} {line.strip()}" for n in names}
    return found


def _also(section: Json, names: dict[str, str]) -> None:
    """Allow other tools' names beside the own ones; a required key may stand under either."""
    for theirs, ours in names.items():
        section["properties"][theirs] = {**section["properties"][ours], "description": f"the same as {ours}"}
        if ours in section.get("required", []):
            section["required"].remove(ours)


def _without_title(schema: Json) -> Json:
    return {k: v for k, v in schema.items() if k not in ("title", "description", "default")}


def _kept(schema: Json) -> dict[str, Any]:
    return {k: v for k, v in schema.items() if k in ("description", "default")}
