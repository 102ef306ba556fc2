"""The report of a finished run: one HTML file that needs nothing else, the same as Markdown with figures, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.border.counts import plural
from plait.disk.store import staged_file
from plait.evaluation.scores import write_parquet
from plait.progress import duration
from plait.report.account import Account, account_of
from plait.report.charts import charts_of
from plait.report.colours import ranked_arms, slots_of
from plait.report.figures import figures_of
from plait.report.numbers import Headline, headline_of, published_tables, report_tables
from plait.report.render import Document, render_html, render_markdown
from plait.report.scores import long_table
from plait.report.sections import about_lines, sections_of
from plait.report.verdict import verdict_of
from plait.runs.folder import published
from plait.runs.layout import Layout

__all__ = ["Written", "document_of", "write_report"]


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Args:
        headline: The figures a script wants.
        html, json, markdown: Paths of the pages and of the numbers.
        figures: Paths of the figures the Markdown page shows.
        rows: Number of rows: arms x merges x seeds, and those of the ablations.
    """

    headline: Headline
    html: Path
    json: Path
    markdown: Path
    figures: tuple[Path, ...]
    rows: int


def write_report(
    layout: Layout,
    folder: Path,
    *,
    name: str = "report",
    about: Mapping[str, str] | None = None,
    against: str | None = None,
) -> Written:
    """Write NAME.html, NAME.json, NAME.md and figures NAME-*.svg; of a report scores.parquet too.

    The Markdown of a study shows its figures; that of a report stands alone and folds what is long, so that it can be pasted
    into a pull request.

    Where adapters alone do not beat the floor by a point, *recovered* is null, comparisons of it too, and `undefined` in the
    JSON (a sentence on the page) says of which seeds and why; scores are there all the same.

    Args:
        layout: Layout of a finished run, tuned or not.
        folder: Folder to write into; files that are there are replaced.
        name: "report", or a study's own name: then the JSON holds what a study publishes and no more.
        about: What the page says about where it was run besides what the runs noted; of the same key, this.
        against: The arm the others are compared with; "contrastive", or the first arm where there is none of that name.

    Raises:
        RunError: The run is not finished.
        UsageError: No arm of the name `against`.
    """
    account = account_of(layout, about=about, against=against)
    tables = report_tables(account)
    figures = figures_of(tables, account.main)
    files = {figure: f"{name}-{figure}.svg" for figure in figures}
    numbers = tables if name == "report" else published_tables(account)
    page, is_report = document_of(account, name=name, figures=list(files.values())), name == "report"
    texts = {
        f"{name}.html": render_html(page),
        f"{name}.json": json.dumps(numbers, indent=1, allow_nan=False) + "\n",
        f"{name}.md": render_markdown(page, {} if is_report else files, folder, folded=is_report),
        **{files[figure]: svg for figure, svg in figures.items()},
    }
    for file, text in texts.items():
        with staged_file(folder / file, overwrite=True) as stage:
            stage.write_text(text, encoding="utf-8")
    if is_report:
        with staged_file(folder / "scores.parquet", overwrite=True) as stage:
            write_parquet(stage, list(long_table(layout)))
    html, data, markdown = (folder / f"{name}.{suffix}" for suffix in ("html", "json", "md"))
    drawn = tuple(folder / f for f in files.values())
    return Written(headline_of(account), html, data, markdown, drawn, len(account.rows))


def document_of(account: Account, *, name: str = "report", figures: Sequence[str] = ()) -> Document:
    """Put a run's account into a document.

    Args:
        account: The numbers.
        name: What its files are called.
        figures: Names of the figures that lie beside it as files.
    """
    recipe, best = account.recipe, [b.arm for b in account.best]
    slots = slots_of(ranked_arms(account.main, best))
    tasks, seeds = plural(len(recipe.tasks), "task"), plural(len(recipe.seeds), "seed")
    lead = f"{tasks} on `{published(recipe.base.model)}`, rank {recipe.lora.rank}, {seeds}."
    beside = [f"{name}.{suffix}" for suffix in ("json", "md")] + ["scores.parquet"] * (name == "report")
    drawn = f" Figures as files: {', '.join(f'`{f}`' for f in figures)}." if figures else ""
    return Document(
        title=recipe.name,
        lead=[line for line in (lead, recipe.description, _when(account)) if line],
        verdict=verdict_of(account),
        sections=sections_of(account),
        about=about_lines(account),
        files=f"Every number is in {', '.join(f'`{f}`' for f in beside)} beside this page.{drawn}",
        charts=charts_of(account, slots),
    )


def _when(account: Account) -> str:
    """Say when, how long and by which command it was made, as far as the runs noted it."""
    about = account.about
    said_of_it = about.get("seconds", "")
    seconds = said_of_it.partition(" ")[0].rstrip(",")
    is_whole = seconds.isdecimal() and "more" not in said_of_it  # runs that were killed have no seconds
    took = duration(int(seconds)) if is_whole else ""
    said = [about.get("date", ""), " on ".join(x for x in (took, about.get("hardware", "")) if x)]
    return " · ".join([*(x for x in said if x), *(f"`{c}`" for c in [about.get("command")] if c)])
