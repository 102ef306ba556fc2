"""The report of a finished run: one HTML file that needs nothing else, the same as Markdown with figures, and as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plait.disk.store import staged_file
from plait.evaluation.scores import write_parquet
from plait.report.account import Account, account_of
from plait.report.figures import figures_of
from plait.report.numbers import Headline, headline_of, published_tables, report_tables
from plait.report.scores import long_table
from plait.report.sections import about_lines, sections_of, verdict
from plait.runs.folder import published
from plait.runs.layout import Layout

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["Written", "linked", "render_html", "render_markdown", "write_report"]
LONGEST_TABLE = 60  # lines of a table in Markdown; longer ones are for the HTML page, which can sort them
_PAGES = re.compile(r"\bdocs/[\w./-]+\.md\b")
_CAPTIONS = {
    "recovered": "recovered by arm",
    "scales": "points lost by scale",
    "curves": "scores by scale",
    "sweep": "the sweep: learning rate, single scores, delta norms",
    "interference": "predicted output shifts",
}


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
    """Write NAME.html, NAME.json, NAME.md with its figures NAME-*.svg, and of a report scores.parquet too.

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
    texts = {
        f"{name}.html": render_html(account, figures),
        f"{name}.json": json.dumps(numbers, indent=1, allow_nan=False) + "\n",
        f"{name}.md": render_markdown(account, files, folder),
        **{files[figure]: svg for figure, svg in figures.items()},
    }
    for file, text in texts.items():
        with staged_file(folder / file, overwrite=True) as stage:
            stage.write_text(text, encoding="utf-8")
    if name == "report":
        with staged_file(folder / "scores.parquet", overwrite=True) as stage:
            write_parquet(stage, list(long_table(layout)))
    html, data, markdown = (folder / f"{name}.{suffix}" for suffix in ("html", "json", "md"))
    drawn = tuple(folder / f for f in files.values())
    return Written(headline_of(account), html, data, markdown, drawn, len(account.rows))


def render_html(account: Account, figures: Mapping[str, str]) -> str:
    """Fill the HTML template; every text from outside is escaped, and no script but the page's own can run.

    Args:
        account: What the page tells.
        figures: Name -> SVG.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("plait.report", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["inline"] = _inline
    script = loader.get_source(environment, "sort.js")[0]
    return environment.get_template("page.html.j2").render(
        recipe=account.recipe,
        base=published(account.recipe.base.model),
        verdict=verdict(account),
        about=about_lines(account),
        sections=sections_of(account),
        figures={figure: Markup(svg) for figure, svg in figures.items()},
        script=Markup(script),
        script_sha256=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def render_markdown(account: Account, figures: Mapping[str, str], to: Path) -> str:
    """Fill the Markdown template.

    Args:
        account: What the page tells.
        figures: Name -> file; each is put where its table is.
        to: Folder the page goes into, where links start.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("plait.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    text = environment.get_template("page.md.j2").render(
        title=account.recipe.name,
        description=linked(account.recipe.description, to),
        verdict=verdict(account),
        about=about_lines(account),
        sections=sections_of(account),
        captions=_CAPTIONS,
        figures=figures,
        longest=LONGEST_TABLE,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


_INLINE = (
    (re.compile(r"`([^`]+)`"), r"<code>\1</code>"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"<b>\1</b>"),
    (re.compile(r"(?<![\w*])\*([^*\s][^*]*)\*(?!\w)"), r"<i>\1</i>"),
)


def _inline(text: str) -> Markup:
    """Escape a text and turn its `code`, **strong** and *emphasis* into HTML."""
    from markupsafe import Markup, escape

    html = str(escape(text))
    for pattern, element in _INLINE:
        html = pattern.sub(element, html)
    return Markup(html)


def linked(text: str, to: Path) -> str:
    """Turn the ``docs/...md`` of a text into links from a folder, where that folder lies in a tree that has them."""
    start = to.resolve()

    def link(match: re.Match[str]) -> str:
        pages = (root / match[0] for root in (start, *start.parents))
        page = next((p for p in pages if p.is_file()), None)
        return f"[{match[0]}]({Path(os.path.relpath(page, start)).as_posix()})" if page else match[0]

    return _PAGES.sub(link, text)
