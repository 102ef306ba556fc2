"""The page about two runs: what it says, and how it is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from plait.border.counts import plural
from plait.disk.store import staged_file, versions
from plait.report.colours import slots_of
from plait.report.comparison import Change, TwoRuns, compare_runs
from plait.report.drawing import Dot, Mark, dots_of
from plait.report.inference import Interval
from plait.report.numbers import finite
from plait.report.render import Document, render_html, render_markdown
from plait.report.table import mean
from plait.report.words import NONE, Cell, Section, Table, Verdict, percent, signed

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["comparison_document", "verdict_on", "write_comparison"]
_DEEPEST = 10.0  # points of difference that have the deepest colour
_LONGEST = 60  # characters of a setting's value


def write_comparison(first: Path, second: Path, folder: Path) -> tuple[TwoRuns, dict[str, str]]:
    """Compare two runs and write comparison.html, comparison.md and comparison.json.

    Args:
        first: Folder of a finished run.
        second: Folder of another.
        folder: Folder to write into; files that are there are replaced.

    Returns:
        The comparison, and suffix -> path of what was written.

    Raises:
        InputError, RunError, UsageError: As `compare_runs`.
    """
    compared = compare_runs(first, second)
    page = comparison_document(compared)
    numbers = finite(asdict(compared), 6) | {"versions": versions()}
    texts = {
        "html": render_html(page),
        "md": render_markdown(page, {}, folder),
        "json": json.dumps(numbers, indent=1, allow_nan=False) + "\n",
    }
    paths = {suffix: folder / f"comparison.{suffix}" for suffix in texts}
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in texts.items():
        with staged_file(paths[suffix], overwrite=True) as stage:
            stage.write_text(text, encoding="utf-8")
    return compared, {suffix: str(path.absolute()) for suffix, path in paths.items()}


def comparison_document(compared: TwoRuns) -> Document:
    """Put a comparison into a document; the first run is A, the second B."""
    a, b = (side.name for side in compared.sides)
    arms = list(dict.fromkeys(c.arm for c in compared.changes[1:]))
    figure = {"difference": _chart(compared, arms)} if compared.changes[1:] else {}
    sections = [
        Section("The best of each", "", (_best_table(compared),)),
        Section("By task", _BY_TASK, (_task_table(compared),), figure="difference", notes=compared.missing),
        Section("What was set otherwise", "", (_settings_table(compared),)),
    ]
    return Document(
        title=f"{a} and {b}",
        lead=[f"A: `{a}`, B: `{b}`; {plural(len(compared.tasks), 'task')} in common."],
        verdict=verdict_on(compared),
        sections=[s for s in sections if any(t.rows for t in s.tables)],
        about=[_drawn(compared), "page made with: " + ", ".join(f"{k} {v}" for k, v in versions().items())],
        files="Every number is in `comparison.json` beside this page.",
        charts=figure,
    )


_BY_TASK = "Points that B scores more than A under the same arm and merge, on the tasks that both have. Blue: B is better, orange: A is."


def verdict_on(compared: TwoRuns) -> Verdict:
    """Say which of two runs scores more under its best arm and merge, and whether chance could do that."""
    best = compared.changes[0]
    told = best.interval is not None and (best.interval[0] > 0 or best.interval[1] < 0)
    a, b = (side.best[0] for side in compared.sides)
    sure = f" (95 % interval {_between(best.interval)})" if best.interval else ""
    text = (
        f"The best of B, `{b.arm}` under {' / '.join(dict.fromkeys(b.merges.values()))}, scores {best.second:z.1f} in the mean;"
        f" the best of A, `{a.arm}` under {' / '.join(dict.fromkeys(a.merges.values()))}, {best.first:z.1f}:"
        f" **{signed(best.difference)} points**{sure}."
    )
    better = "B" if best.difference > 0 else "A"
    if best.difference == 0:
        text += " They score the same."
    elif told:
        text += f" {better} is better beyond chance, on these tasks and for these arms."
    else:
        text += " Chance alone could make this difference."
    low, high = (f(best.tasks, key=lambda t: best.tasks[t]) for f in (min, max))
    facts = [
        ("best of A", f"`{a.arm}`, keeps {percent(a.mean_recovered)} %"),
        ("best of B", f"`{b.arm}`, keeps {percent(b.mean_recovered)} %"),
        ("B gains most", f"{high}, {signed(best.tasks[high])} points"),
        ("B gains least", f"{low}, {signed(best.tasks[low])} points"),
    ]
    return Verdict(signed(best.difference), "points, B against A", text, facts)


def _drawn(compared: TwoRuns) -> str:
    which = "the same in both runs" if compared.paired else "independent: rows, seeds or splits of the runs differ"
    return f"{compared.resamples} resamples of seeds and examples, {which}; tasks are not drawn"


def _between(interval: Interval | None) -> str:
    return f"{interval[0]:+z.1f} to {interval[1]:+z.1f}" if interval else ""


def _best_table(compared: TwoRuns) -> Table:
    header = ("run", "arm", "merge", "single", "merged", "recovered, %", "of own, %", "worst task", "seeds")
    rows = []
    for name, side in zip("AB", compared.sides, strict=True):
        b = side.best[0]
        merges = " / ".join(dict.fromkeys(b.merges.values()))
        shares = (percent(b.mean_recovered), percent(mean(b.recovered_of_own)))
        worst = f"{b.worst} {signed(b.worst_task)}"
        scores = (f"{b.individual:z.1f}", f"{mean(b.merged):z.1f}")
        rows.append((Cell(name, side.name), f"`{b.arm}`", merges, *scores, *shares, worst, str(len(b.seeds))))
    return Table(header, rows, caption="Each run's best arm under its best merge, on all of its tasks.", kind="wide")


def _task_table(compared: TwoRuns) -> Table:
    def cell(difference: float, interval: Interval | None) -> Cell:
        tint = max(-1.0, min(1.0, difference / _DEEPEST))
        return Cell(signed(difference), _between(interval), tint, difference)

    rows: list[Sequence[str | Cell]] = []
    for c in compared.changes:
        each = (cell(c.tasks[t], c.intervals[t]) for t in compared.tasks)
        whose = Cell("best of each") if c is compared.changes[0] else Cell(f"`{c.arm}`", c.merge)
        rows.append([whose, f"{c.first:z.1f}", f"{c.second:z.1f}", cell(c.difference, c.interval), *each])
    header: list[str | Cell] = [
        "arm, merge",
        Cell("A", "mean"),
        Cell("B", "mean"),
        Cell("B - A", "points"),
        *compared.tasks,
    ]
    caption = "Mean scores, percent, and differences with their 95 % intervals."
    return Table(header, rows, caption=caption, kind="wide", strong=frozenset({0}))


def _settings_table(compared: TwoRuns) -> Table:
    rows = [(f"`{key}`", *(_setting(v) for v in values)) for key, values in compared.settings.items()]
    return Table(("setting", "A", "B"), rows, caption="Keys of the recipes whose values differ.", kind="wide")


def _setting(value: object) -> str:
    text = NONE if value is None else str(value)
    return f"`{text if len(text) <= _LONGEST else text[: _LONGEST - 1] + '…'}`"


def _chart(compared: TwoRuns, arms: Sequence[str]) -> Markup:
    changes: Sequence[Change] = compared.changes[1:]
    dots = [Dot(c.arm, c.merge, c.difference, c.interval) for c in changes]
    return dots_of(
        dots, [Mark("no difference", 0.0, "solid")], "mean score of B minus that of A, points", slots_of(arms)
    )
