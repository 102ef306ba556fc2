"""Commands about whole runs: run, plan, validate, ls, cp, report, demo."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.border.counts import plural
from plait.cli.execution import ExecutorName, Scorers, Workers, execute
from plait.cli.options import Json, Out, Overwrite, Quiet, RecipeArg, Set
from plait.cli.output import emit, table
from plait.errors import UsageError, printable


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    for command in (demo, run, plan, validate, cp):
        app.command()(command)
    app.command("ls")(list_names)
    app.command()(report)


def demo(
    out: Out = Path("plait-demo"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train, merge and score real adapters of a small model. Takes a few minutes on a CPU.

    It says at the end how many CPU seconds it took.
    """
    from plait.demo import floors_text, next_step, run_demo

    found, floors = run_demo(out, overwrite=overwrite, quiet=quiet)
    seconds = sum(os.times()[:4])  # of this process and its children; of what stood there already, nothing
    result = {**found, "frozen_base": {f.task: f.frozen for f in floors}, "cpu_seconds": round(seconds, 1)}
    reused = int(found["reused"])
    took = f"This took {seconds:.0f} CPU seconds" + (
        f"; {plural(reused, 'result', 'was', 'were')} there already." if reused else "."
    )
    emit(result, as_json, "\n\n".join([result_text(found), floors_text(floors), took, next_step(out)]))


def run(
    recipe: RecipeArg, out: Out = Path("plait-run"), sets: Set = None,
    executor: ExecutorName = "serial", workers: Workers = None, scorers: Scorers = None,
    overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Do all that a recipe says. Started again, it goes on where it stopped."""
    from plait.report.line import report

    layout, outcome = execute(read(recipe, sets), out, executor, workers, scorers, overwrite=overwrite, quiet=quiet)
    found = {**report(layout), "seconds": outcome.seconds, "units": outcome.done, "reused": outcome.reused}
    emit(found, as_json, result_text(found))


def plan(
    recipe: RecipeArg,
    out: Out = Path("plait-run"),
    sets: Set = None,
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Load the base and time it, for the minutes a run takes here."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Say what run would do, and what is there already. Changes nothing.

    With the minutes that it takes on this machine: the base is timed on a batch of every task.
    """
    from plait.progress import duration
    from plait.runs.forecast import describe

    forecast = describe(read(recipe, sets), out, measure=measure)
    rows = [[stage, str(n.units), str(n.reused)] for stage, n in forecast.stages.items()]
    tail = f"\n{plural(forecast.adapters, 'adapter')}; {plural(forecast.forward_rows, 'row')} through the base, training counted 3.5 times"
    if forecast.seconds is not None and forecast.seconds_per_row is not None:
        pace = f"{1000 * forecast.seconds_per_row:.3g} ms a row, as it was just timed"
        tail += f"\nabout {duration(forecast.seconds)} on this machine ({pace}); loading and merging come on top"
    scored = ", ".join(f"{task} {n['validation']}" for task, n in forecast.rows.items())
    tail += f"\nscored on so many rows: {scored}"
    limit = next(cut.limit for splits in forecast.cut.values() for cut in splits.values())
    tail += "".join(f"\n{line}" for line in forecast.cut_said or [f"no row that was counted is cut at {limit} tokens"])
    tail += "\nthe sweep alone: what it chooses decides what follows" if forecast.tuned else ""
    emit(forecast, as_json, table(["stage", "units", "reused"], rows) + tail)


def validate(recipe: RecipeArg, sets: Set = None, as_json: Json = False) -> None:
    """Check every key, name, value and file of a recipe.

    Of files and folders, that they are there; no data and no model is read.
    """
    from plait.recipes.missing import missing_files

    found = read(recipe, sets)
    missing = missing_files(found)
    said = [f"{recipe}: a valid recipe{' in its form' if missing else ''}"]
    said += [f"{m.key}: {m.path}: no such file or folder ({m.hint})" for m in missing]
    result = {"valid": not missing, "missing": [asdict(m) for m in missing], "recipe": found.model_dump(mode="json")}
    emit(result, as_json, "\n".join(said))
    if missing:
        what = missing[0].path if len(missing) == 1 else f"{missing[0].path} and {len(missing) - 1} more"
        typer.echo(
            f"error: {recipe}: {printable(what)} {'is' if len(missing) == 1 else 'are'} missing; its keys and values are valid",
            err=True,
        )
        raise typer.Exit(3)


def cp(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, or studies/NAME.")],
    to: Annotated[Path, typer.Argument(help="A folder, or a file that does not exist yet.")] = Path(),
    as_json: Json = False,
) -> None:
    """Copy a shipped recipe, to be edited."""
    from plait.demo import copy_demo
    from plait.recipes.recipe_file import copy_recipe

    target = copy_demo(to) if recipe in ("demo", "demo.yaml") and not Path(recipe).exists() else copy_recipe(recipe, to)
    emit({"output": str(target.absolute())}, as_json, str(target))


def list_names(
    what: Annotated[str, typer.Argument(help="merges, subspaces, recipes, studies, tasks, or nothing for all.")] = "",
    as_json: Json = False,
) -> None:
    """List merge methods, subspace methods, recipes, studies, tasks."""
    from plait.cli.catalogue import catalogue

    found = catalogue(what)
    blocks = [_merges(rows) if kind == "merges" else f"{kind}\n{_listed(rows)}" for kind, rows in found.items()]
    emit(found, as_json, "\n\n".join(blocks))


def _listed(rows: list[dict[str, Any]]) -> str:
    width = max(20, *(len(r["name"]) for r in rows))
    return "\n".join(f"  {r['name'].ljust(width)} {r['about']}{_options(r)}" for r in rows)


def _merges(rows: list[dict[str, Any]]) -> str:
    """Merging methods by what they need, in plain words, the one to start with first and marked."""
    from plait.cli.plainly import FIRST, MERGES, needs_in_words

    order = {name: i for i, name in enumerate(MERGES)}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(needs_in_words(row["needs"]), []).append(row)
    lines = ["merges (* where to start; options and formulas: plait ls merges --json, docs)"]
    for heading, members in groups.items():
        lines += ["", heading]
        for r in sorted(members, key=lambda r: (not r["first"], order.get(r["name"], len(order)))):
            mark, options = "*" if r["first"] else " ", ", ".join(r["options"])
            said = f"{r['plainly']}{f' ({FIRST[name]})' if (name := r['name']) in FIRST else ''}"
            lines.append(f"{mark} {name.ljust(18)} {said}" + (f"  [{options}]" if options else ""))
    return "\n".join([*lines, "", "plait merge auto chooses among them by a few texts of each task, without labels."])


def report(
    folders: Annotated[list[Path], typer.Argument(help="The folder of a run; two folders: one against the other.")],
    to: Annotated[Path, typer.Option("--to", help="Folder of the page about two runs.")] = Path("plait-comparison"),
    as_json: Json = False,
) -> None:
    """Write the report of a run again, or compare two runs.

    Of two folders it writes comparison.html, comparison.md and comparison.json.
    """
    from plait.report.line import report_again

    if len(folders) == 1:
        found = report_again(folders[0])
        emit(found, as_json, result_text(found))
        return
    if len(folders) > 2:
        raise UsageError(f"{len(folders)} runs given", hint="one, or two to compare: plait report A B")
    from plait.report.comparison_page import verdict_on, write_comparison

    compared, paths = write_comparison(folders[0], folders[1], to)
    verdict = verdict_on(compared)
    rows = [
        [c.arm, c.merge, f"{c.first:.1f}", f"{c.second:.1f}", f"{c.difference:+.1f}",
         f"{c.interval[0]:+.1f} to {c.interval[1]:+.1f}" if c.interval else ""]
        for c in compared.changes
    ]  # fmt: skip
    shown = table(["arm", "merge", "A", "B", "B - A", "95 % interval"], rows, text_columns=2)
    text = verdict.text.replace("**", "").replace("`", "")
    names = f"A  {folders[0]}\nB  {folders[1]}"
    emit({**asdict(compared), "paths": paths}, as_json, f"{names}\n\n{text}\n\n{shown}\n\nreport   {paths['html']}")


def read(recipe: Path, sets: list[str] | None) -> Any:
    """A recipe from a file or by the name of a shipped one."""
    from plait.recipes.recipe_file import find_recipe, read_recipe

    return read_recipe(find_recipe(recipe), sets or [])


def _options(row: dict[str, Any]) -> str:
    shown = ", ".join(f"{name}={o['default']}" for name, o in row.get("options", {}).items())
    return f"  [{shown}]" if shown else ""


BY_MERGE = (
    "merged", "merged_standard_error", "recovered", "recovered_standard_error", "recovered_of_own", "worst_task", "scale",
)  # fmt: skip


def _share(value: float | None, error: float | None = None) -> str:
    """Write a share in percent, and its standard error where known; a dash where it is not defined."""
    return "–" if value is None else f"{100 * value:.0f} %" + (f" ± {100 * error:.0f}" if error is not None else "")


def result_text(found: dict[str, Any]) -> str:
    """The main table as plain text, with uncertainty, and where the report lies."""
    rows = []
    for arm, merges in found["merged"].items():
        for merge in merges:
            cell = {name: found[name][arm][merge] for name in BY_MERGE}
            (worst, drop), error = cell["worst_task"], cell["merged_standard_error"]
            rows.append(
                [
                    arm,
                    merge,
                    f"{found['individual'][arm]:.1f}",
                    f"{cell['merged']:.1f}" + (f" ± {error:.1f}" if error is not None else ""),
                    f"{found['floor']:.1f}",
                    _share(cell["recovered"], cell["recovered_standard_error"]),
                    _share(cell["recovered_of_own"]),
                    f"{worst} {drop:+.1f}",
                    f"{cell['scale']:.3g}",
                ]
            )
    header = ["arm", "merge", "alone", "merged", "floor", "recovered", "of own", "worst task", "scale"]
    legend = (
        "Mean score over tasks, % (± one standard error over seeds and examples). alone: each adapter on its own task;\n"
        "merged: one adapter for all; floor: no adapter; recovered: (merged - floor) / (alone - floor), alone being the plain\n"
        "arm's; of own: alone being the arm's own; worst task: what the task that loses most loses. arm: how they start and are\n"
        "trained. scale: each half of the rows is scored at the scale that the other half chose; this is the mean of the two, the\n"
        "adapter below has the one that is best on all rows."
    )
    if any((found["recovered"][arm][m] or 0) > 1 for arm, merges in found["merged"].items() for m in merges):
        legend += "\nMore than 100 %: better than the plain adapters alone; were those trained long enough?"
    best = found.get("best_is") or {}
    which = f"  ({best['arm']}, {best['merge']} at scale {best['scale']:.3g}, seed {best['seed']})" if best else ""
    return f"{table(header, rows, text_columns=2)}\n\n{legend}\n\nreport   {found['report']}\nadapter  {found['best']}{which}"
