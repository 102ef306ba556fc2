"""Which files that a recipe names are not there: told before a run is begun, without reading any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from plait.disk.files import nearby
from plait.disk.hub import is_hub_name, split_revision
from plait.recipes.recipe import Recipe
from plait.recipes.recipe_file import variant_of
from plait.tasks.glue import glue_task
from plait.tasks.task import Source

_HUB = "hub:"


@dataclass(frozen=True, slots=True)
class MissingFile:
    """A file or folder that a recipe names, and that is not there.

    Args:
        key: Where the recipe names it, such as "tasks.mood.train".
        path: Where it is looked for.
        hint: What may be meant instead.
    """

    key: str
    path: str
    hint: str


def missing_files(recipe: Recipe) -> tuple[MissingFile, ...]:
    """List local files and folders that a recipe or a variant of it names and that are not there; names on the hub are left alone."""
    everything = [recipe, *(variant_of(recipe, v.name) for v in recipe.variants)]
    found = {m.path: m for one in reversed(everything) for m in _of_one(one)}
    return tuple(sorted(found.values(), key=lambda m: m.key))


def _of_one(recipe: Recipe) -> Iterator[MissingFile]:
    base = split_revision(recipe.base.model)[0]
    if not is_hub_name(base) and not Path(recipe.base.model).expanduser().exists():
        yield MissingFile("base.model", recipe.base.model, nearby(Path(recipe.base.model).expanduser()))
    root = Path(recipe.data.root).expanduser() if recipe.data.root else None
    if root is not None and not root.exists():
        yield MissingFile("data.root", str(root), nearby(root))
        return
    for task in recipe.tasks:
        name, source = (
            (task, glue_task(task, root).source)
            if isinstance(task, str)
            else (task.name, Source(task.train, task.validation))
        )
        for split, place in (("train", source.train), ("validation", source.validation)):
            if place and not place.startswith(_HUB) and not (path := (root or Path()) / place).exists():
                under = "" if root else ", or set data.root to the folder where the rows are"
                yield MissingFile(f"tasks.{name}.{split}", str(path), nearby(path) + under)
