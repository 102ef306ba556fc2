"""Commands about studies: study run, study table, study archive, job run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.border.counts import plural
from plait.cli.execution import ExecutorName, Scorers, Seconds, Workers, execute
from plait.cli.options import Json, Out, Quiet, Set
from plait.cli.output import emit


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    study = typer.Typer(help="Arms x merges x seeds, with controls, by a fixed protocol.", no_args_is_help=True)
    study.command("run")(run)
    study.command("table")(table)
    study.command("archive")(archive)
    app.add_typer(study, name="study")
    job = typer.Typer(help="Single batches of a study, for schedulers.", no_args_is_help=True)
    job.command("list")(list_batches)
    job.command("run")(run_job)
    app.add_typer(job, name="job")


StudyArg = Annotated[Path, typer.Argument(help="A study: a YAML file, or the name of a shipped one.")]


def run(
    study: StudyArg, out: Out = Path("plait-study"), sets: Set = None,
    executor: ExecutorName = "serial", workers: Workers = None, scorers: Scorers = None, seconds: Seconds = None,
    quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Do what a study still lacks. Started again, it goes on where it stopped."""
    from plait.recipes.recipe_file import find_study, read_recipe

    _, outcome = execute(
        read_recipe(find_study(study), sets or []), out, executor, workers, scorers, seconds=seconds, quiet=quiet
    )
    said = (
        "finished"
        if outcome.finished
        else f"not finished: {plural(outcome.left, 'unit')} of wave {outcome.wave!r} left"
    )
    emit(outcome, as_json, f"{said}, {outcome.seconds:.0f} s")


def table(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished study.")],
    to: Annotated[Path, typer.Option("--to", help="Folder of the tables and figures.")] = Path(),
    about: Annotated[list[str] | None, typer.Option("--about", help="KEY=TEXT for the page; may be repeated.")] = None,
    against: Annotated[str | None, typer.Option("--against", help="The arm the others are compared with.")] = None,
    sets: Set = None,
    as_json: Json = False,
) -> None:
    """Write the tables and figures of a finished study. NAME.json, NAME.md, NAME.html and NAME-*.svg.

    The folder says what its base and data were, so that neither need be at hand.
    """
    from plait.report import write_report
    from plait.runs.folder import layout_of_folder

    layout = layout_of_folder(folder, sets or [])
    said = dict(pair.split("=", 1) for pair in about or [] if "=" in pair)
    written = write_report(layout, to, name=layout.recipe.name, about=said, against=against)
    paths = {"markdown": str(written.markdown), "json": str(written.json), "html": str(written.html)}
    figures = [str(path) for path in written.figures]
    emit({**paths, "figures": figures, "rows": written.rows}, as_json, "\n".join([*paths.values(), *figures]))


def archive(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished study.")],
    to: Annotated[Path, typer.Option("--to", help="The file to write, *.tar.xz.")],
    base: Annotated[str, typer.Option("--base", help="What the base is called there.")] = "",
    data: Annotated[str, typer.Option("--data", help="What the folder of the data is called there.")] = "",
    sets: Set = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands at --to.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Pack a finished study into one file to publish. What its tables need: answers and labels; no texts, no adapters."""
    from plait.runs.archive import write_archive
    from plait.runs.folder import layout_of_folder

    packed = write_archive(layout_of_folder(folder, sets or []), to, base=base, data=data, overwrite=overwrite)
    emit(packed, as_json, f"{plural(packed.units, 'result')}, {packed.bytes / 1e6:.1f} MB -> {to}")


def list_batches(
    study: StudyArg, out: Out = Path("plait-study"), sets: Set = None, workers: Workers = None,
    to: Annotated[Path, typer.Option("--to", help="Folder for the job files.")] = Path("jobs"), as_json: Json = False,
) -> None:  # fmt: skip
    """Write a study's open units as job files, one per worker. The next wave, for an array of a scheduler."""
    from plait.recipes.recipe_file import find_study, read_recipe
    from plait.runs.run import write_jobs

    jobs = write_jobs(read_recipe(find_study(study), sets or []), out, to, workers or 1)
    emit(jobs, as_json, "\n".join(jobs.jobs) or "finished")


def run_job(
    job: Annotated[str, typer.Argument(help="A job file, or - for standard input.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Do one batch of a study."""
    from plait.progress import Progress
    from plait.runs.executors import run_batch
    from plait.runs.job_file import read_batch
    from plait.runs.reporting import Shown

    batch = read_batch(job)
    done = run_batch(batch, report=Shown(Progress(len(batch["units"]), len(batch["units"]), quiet)))
    emit({"done": done}, as_json, plural(done, "unit"))
