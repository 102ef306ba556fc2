"""The whole line: run a recipe, report on it, and say where everything lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plait.disk.store import discard, identity, read_json, read_manifest, staged_folder
from plait.recipes.recipe import Recipe
from plait.report.page import write_report
from plait.runs.best import best_place
from plait.runs.executors import Executor, InProcess
from plait.runs.folder import PRODUCTS, layout_of_folder
from plait.runs.layout import Layout
from plait.runs.run import run as run_units
from plait.runs.waves import all_units

REPORT = PRODUCTS[1]


def run(
    recipe: Recipe, out: Path | str, *, executor: Executor | None = None, overwrite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Do everything a recipe says, and report on it.

    Args:
        recipe: The checked recipe.
        out: The folder of the run; an unfinished run there is resumed.
        executor: Where units run; in this process by default.
        overwrite: Redo what stands there with other settings (results that match are always kept).
        quiet: No progress on stderr.

    Returns:
        The report's headline (see `plait.report.write_report`), the paths of the `report` and of the `best` merge, `seconds`,
        units that were `done` and `reused`.

    Raises:
        UsageError: `out` holds results of other settings; nothing was changed.
        EnvironmentFault: Another process is at work on `out`.
    """
    out = Path(out)
    layout = executor.layout if isinstance(executor, InProcess) else Layout(recipe, out)
    outcome = run_units(recipe, out, executor=executor, layout=layout, overwrite=overwrite, quiet=quiet)
    counted = {"seconds": outcome.seconds, "units": outcome.done, "reused": outcome.reused}
    if not outcome.finished:
        return {**counted, "finished": False, "wave": outcome.wave, "left": outcome.left}
    return {**report(layout), **counted}


def report(layout: Layout) -> dict[str, Any]:
    """Write the report of a finished run beside its results, unless it is there.

    Returns:
        The report's headline, the paths of the `report` and of the `best` merge, and which one that is (`best_is`).

    Raises:
        RunError: The run is not finished.
    """
    made = {str(layout.of(u).path(u).relative_to(layout.out)): layout.of(u).key(u) for u in all_units(layout)}
    options = {"resamples": layout.recipe.evaluation.resamples, "name": layout.recipe.name}
    wanted, page = identity(REPORT, options, made, layout.recipe.seeds[0]), layout.out / REPORT
    if not layout.is_whole(page, wanted, overwrite=True):
        with staged_folder(page, wanted, overwrite=True, unit=True) as folder:
            write_report(layout, folder)
    headline = read_json(page / "report.json")["headline"]
    places = {"report": str((page / "report.html").absolute()), "best": str(best_place(layout).absolute())}
    made = (read_manifest(best_place(layout)) or {}).get("result", {})
    return {**headline, **places, "best_is": {k: made[k] for k in ("arm", "merge", "scale", "seed") if k in made}}


def report_again(folder: Path) -> dict[str, Any]:
    """Write the report of a finished run again from its scores, and return the headline.

    Raises:
        InputError: The folder is no run.
        RunError: A part of the run is missing.
    """
    layout = layout_of_folder(folder)
    if (folder / REPORT).is_dir():
        discard(folder / REPORT)
    return report(layout)
