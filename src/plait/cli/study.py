"""Commands about studies: study run, study table, study archive, job run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.options import Json, Out, Quiet, Set
from plait.cli.output import emit

if TYPE_CHECKING:
    from plait.runs.units import Layout


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
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Batches at once.")]


def run(
    study: StudyArg, out: Out = Path("plait-study"), sets: Set = None,
    executor: Annotated[str, typer.Option("--executor", help="serial, processes or ray.")] = "serial",
    workers: Workers = None,
    scorers: Annotated[
        int | None, typer.Option("--scorers", min=1, help="Processes that score; by default as many as workers.")
    ] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", min=1, help="Begin nothing after so long.")] = None,
    quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Do what a study still lacks. Started again, it goes on where it stopped."""
    from plait.runs.executors import executor_of
    from plait.runs.recipe_file import find_study, require_known
    from plait.runs.study_run import run_study
    from plait.runs.study_spec import read_study
    from plait.runs.units import Layout

    require_known(executor, ["serial", "processes", "ray"], "executor")
    found = read_study(find_study(study), sets)
    layout = Layout(found, out)
    runs = executor_of(executor, layout, workers, scorers)
    with contextlib.closing(runs):
        done = run_study(found, out, runs, layout=layout, seconds=seconds, quiet=quiet)
    said = "finished" if done["finished"] else f"not finished: {done['left']} units of wave {done['wave']!r} left"
    emit(done, as_json, f"{said}, {done['seconds']:.0f} s")


def table(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished study.")],
    to: Annotated[Path, typer.Option("--to", help="Folder of the tables and figures.")] = Path(),
    about: Annotated[list[str] | None, typer.Option("--about", help="KEY=TEXT for the page; may be repeated.")] = None,
    against: Annotated[str | None, typer.Option("--against", help="The arm the others are compared with.")] = None,
    sets: Set = None,
    as_json: Json = False,
) -> None:
    """Write the tables and figures of a finished study. NAME.json, NAME.md and NAME-*.svg.

    The folder says what its base and data were, so that neither need be at hand.
    """
    from plait.report.write import write_tables

    layout = _kept(folder, sets)
    said = dict(pair.split("=", 1) for pair in about or [] if "=" in pair)
    found = write_tables(layout, to, about=said, against=against)
    emit(found, as_json, "\n".join([found["markdown"], found["json"], *found["figures"]]))


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

    found = write_archive(_kept(folder, sets), to, base=base, data=data, overwrite=overwrite)
    emit(found, as_json, f"{found['units']} results, {found['bytes'] / 1e6:.1f} MB -> {to}")


def _kept(folder: Path, sets: list[str] | None) -> Layout:
    """The study that a folder keeps, with overrides, and what the folder knows of its base and data."""
    from plait.disk.store import read_json
    from plait.runs.inputs import kept_inputs
    from plait.runs.recipe_file import apply_overrides
    from plait.runs.study_run import STUDY_FILE
    from plait.runs.study_spec import parse_study
    from plait.runs.units import Layout

    raw = read_json(folder / STUDY_FILE)
    kept = parse_study(raw, str(folder))
    apply_overrides(raw, sets or [])
    study = parse_study(raw, str(folder))
    return Layout(study, folder, recorded=kept_inputs(folder, kept, study))


def list_batches(
    study: StudyArg, out: Out = Path("plait-study"), sets: Set = None, workers: Workers = None,
    to: Annotated[Path, typer.Option("--to", help="Folder for the job files.")] = Path("jobs"), as_json: Json = False,
) -> None:  # fmt: skip
    """Write a study's open units as job files, one per worker. The next wave, for an array of a scheduler."""
    from plait.runs.recipe_file import find_study
    from plait.runs.study_run import write_jobs
    from plait.runs.study_spec import read_study

    found = write_jobs(read_study(find_study(study), sets), out, to, workers or 1)
    emit(found, as_json, "\n".join(found["jobs"]) or "finished")


def run_job(
    job: Annotated[str, typer.Argument(help="A job file, or - for standard input.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Do one batch of a study."""
    from plait.progress import Progress
    from plait.runs.executors import run_batch
    from plait.runs.job_file import read_batch
    from plait.runs.study_run import told

    batch = read_batch(job)
    progress = Progress(len(batch["units"]), len(batch["units"]), quiet)
    done = run_batch(batch, tell=told(progress))
    emit({"done": done}, as_json, f"{done} units")
