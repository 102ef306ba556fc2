"""Where a run's work is done: the options that say so, and the run itself."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from plait.recipes.recipe import Recipe
    from plait.runs.layout import Layout
    from plait.runs.run import Outcome

ExecutorName = Annotated[str, typer.Option("--executor", help="serial, processes or ray.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Batches at once.")]
Scorers = Annotated[
    int | None, typer.Option("--scorers", min=1, help="Processes that score; by default as many as workers.")
]
Seconds = Annotated[float | None, typer.Option("--seconds", min=1, help="Begin nothing after so long.")]


def execute(
    recipe: Recipe,
    out: Path,
    executor: str,
    workers: int | None,
    scorers: int | None,
    *,
    seconds: float | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> tuple[Layout, Outcome]:
    """Run a recipe by the executor of a name; also returns where its results lie."""
    from plait.recipes.recipe_file import require_known
    from plait.runs.executors import executor_of
    from plait.runs.layout import Layout
    from plait.runs.run import run

    require_known(executor, ["serial", "processes", "ray"], "executor")
    layout = Layout(recipe, out)
    with contextlib.closing(executor_of(executor, layout, workers, scorers)) as where:
        outcome = run(recipe, out, executor=where, layout=layout, seconds=seconds, overwrite=overwrite, quiet=quiet)
    return layout, outcome
