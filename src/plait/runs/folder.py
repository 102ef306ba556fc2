"""What the folder of a run says about itself: its recipe, and what base and data it was run on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plait.disk.store import read_json, staged_file
from plait.errors import InputError
from plait.recipes.recipe import Recipe
from plait.recipes.recipe_file import apply_overrides, parse_recipe
from plait.runs.inputs import INPUTS_FILE, inputs_of, keep_inputs, kept_inputs
from plait.runs.layout import Layout

RECIPE_FILE = "recipe.json"
PRODUCTS = ("best", "report")  # folders that are made of finished units
FILES = (RECIPE_FILE, "study.json")  # the second is what studies of earlier versions are called


def keep(layout: Layout) -> None:
    """Write the resolved recipe, and what it reads, into its folder: tables need nothing else.

    Cost: hashes the base and the files of the data, and reads the validation rows.
    """
    keep_inputs(inputs_of(layout.session, layout.background, layout.cuts), layout.out)
    if not keeps(layout.recipe, layout.out):
        with staged_file(layout.out / RECIPE_FILE, overwrite=True) as stage:
            stage.write_text(_text(layout.recipe), encoding="utf-8")


def is_begun(out: Path) -> bool:
    """Whether a folder is a run's: in any other, what lies where a result belongs is somebody else's."""
    return any((out / name).is_file() for name in FILES)


def keeps(recipe: Recipe, out: Path) -> bool:
    """Whether a folder holds this recipe."""
    path = out / RECIPE_FILE
    return path.is_file() and path.read_bytes() == _text(recipe).encode()


def is_earlier(out: Path) -> bool:
    """Whether a folder is a run of an earlier version, whose results lie elsewhere and are made from other things."""
    return (out / RECIPE_FILE).is_file() and not (out / INPUTS_FILE).is_file()


def _text(recipe: Recipe) -> str:
    return recipe.model_dump_json(indent=1) + "\n"


def layout_of_folder(folder: Path, overrides: Sequence[str] = ()) -> Layout:
    """The layout of a run that lies in a folder, which needs neither the base nor the data.

    Args:
        folder: Where it was run.
        overrides: "dotted.key=value" strings that change its recipe.

    Raises:
        InputError: No run, or one of an earlier version.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), folder / RECIPE_FILE)
    if not path.exists() and folder.is_dir():
        raise InputError(f"no run: no {RECIPE_FILE}", where=str(folder), hint="the folder that plait run --out named")
    raw = read_json(path)
    if is_earlier(folder):
        hint = "plait run its recipe into another folder"
        raise InputError("a run of an earlier version of plait", where=str(folder), hint=hint)
    recorded = parse_recipe(raw, str(folder))
    apply_overrides(raw, overrides)
    recipe = parse_recipe(raw, str(folder))
    return Layout(recipe, folder, recorded=kept_inputs(folder, recorded, recipe))


def published(place: str | None) -> str | None:
    """Say what a base or a folder is called in public: whose folders they lie in is nobody's business, their names may stay.

    A model in the hub's cache goes by its name there, one that came with a package by its place in it.

    >>> published("/home/me/models/bert"), published("someone/bert")
    ('./bert', 'someone/bert')
    >>> published("/home/me/hub/models--someone--bert/snapshots/0123")
    'someone/bert'
    >>> published("/home/me/lib/site-packages/minilm/model")
    'minilm/model'
    """
    if not place or not place.startswith((".", "/", "~")):
        return place
    parts = Path(place).parts
    if cached := [p for p in parts if p.startswith("models--")]:
        return cached[-1].removeprefix("models--").replace("--", "/", 1)
    if "site-packages" in parts[:-1]:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return f"./{Path(place).name}"
