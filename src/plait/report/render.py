"""A document as one self-contained HTML file, and as Markdown."""

from __future__ import annotations

import hashlib
import os
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from plait.report.colours import DARK, LIGHT
from plait.report.words import NONE, Cell, Section, Table, Verdict

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

__all__ = ["Document", "linked", "render_html", "render_markdown"]
LONGEST_TABLE = 60  # lines of a table in Markdown; longer ones are for the HTML page, which can sort them
_PAGES = re.compile(r"\bdocs/[\w./-]+\.md\b")
_DEEPEST = 45  # percent of a cell's colour over the page's at most: letters stay readable, light and dark
_CAPTIONS = {
    "recovered": "recovered by arm",
    "scales": "points lost by scale",
    "curves": "scores by scale",
    "sweep": "the sweep: learning rate, single scores, delta norms",
}


@dataclass(frozen=True, slots=True)
class Document:
    """What a page says; texts are in the small part of Markdown that both kinds of page know.

    Args:
        title: Its heading.
        lead: Lines below it.
        verdict: What came out.
        sections: The rest.
        about: Lines about where it comes from.
        files: A sentence about what lies beside the page.
        charts: Section's figure -> HTML.
    """

    title: str
    lead: Sequence[str]
    verdict: Verdict
    sections: Sequence[Section]
    about: Sequence[str] = ()
    files: str = ""
    charts: Mapping[str, Markup] = field(default_factory=dict)


def render_html(page: Document) -> str:
    """Fill the HTML template; every text from outside is escaped, and no script but the page's own can run."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("plait.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"inline": _inline, "cell": _cell, "look": _look, "words": _words}
    script = loader.get_source(environment, "page.js")[0].strip()
    return environment.get_template("page.html.j2").render(
        page=page,
        charts=page.charts,
        style=Markup(_style(environment)),
        script=Markup(script),
        script_sha256=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def render_markdown(page: Document, figures: Mapping[str, str], to: Path, *, folded: bool = False) -> str:
    """Fill the Markdown template.

    Args:
        page: What is said.
        figures: Section's figure -> file.
        to: Folder the page goes into, where links start.
        folded: Whether all sections but the first are closed until somebody opens them, as in a comment on a pull request.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("plait.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {
        "cell": lambda cell: str(cell).replace("|", "\\|").replace("\n", " "),
        "linked": lambda text: linked(text, to),
    }
    text = environment.get_template("page.md.j2").render(
        page=page, captions=_CAPTIONS, figures=figures, longest=LONGEST_TABLE, folded=folded
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _style(environment: Environment) -> str:
    """Fill the style sheet: the palette, light and dark, and a class for each of its places."""

    def palette(colours: Sequence[str]) -> str:
        return "  " + " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours)) + " --rest: #868c95;"

    arms = " ".join(f".c{i} {{ --c: var(--c{i}); }}" for i in range(len(LIGHT))) + " .rest { --c: var(--rest); }"
    return environment.get_template("page.css").render(light=palette(LIGHT), dark=palette(DARK), arms=arms)


_NUMBER = re.compile(r"[\d+-]")  # how a cell begins that is a number
_CODE = re.compile(r"<code>\w+</code>")  # a name, which may break after its underscores
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
    return Markup(_CODE.sub(lambda code: code[0].replace("_", "_<wbr>"), html))


def _words(table: Table) -> list[Markup]:
    """Write the attribute of each column: a class for those whose cells are words, which stand at the left."""
    from markupsafe import Markup

    columns = [[str(row[i]) for row in table.rows] for i in range(len(table.header))]
    numeric = (any(_NUMBER.match(t) for t in column) or set(column) == {NONE} for column in columns)
    return [Markup("" if is_number else ' class="words"') for is_number in numeric]


def _cell(cell: str | Cell) -> Markup:
    """Write a cell; a long range may break at its dash."""
    from markupsafe import Markup

    if isinstance(cell, str) or not cell.note:
        return _inline(cell if isinstance(cell, str) else cell.text)
    note = Markup(str(_inline(cell.note)).replace("–", "–<wbr>"))
    return Markup("{} <small>{}</small>").format(_inline(cell.text), note)


def _look(cell: str | Cell, kind: str) -> Markup:
    """Write the attributes of a cell: its colour, and what it is sorted by where that is not its text."""
    from markupsafe import Markup

    if isinstance(cell, str):
        return Markup("")
    key = Markup(' data-key="{:.6g}"').format(cell.key) if cell.key is not None else Markup("")
    if cell.tint is None:
        return key
    name = "hot" if kind == "heat" else "loss" if cell.tint < 0 else "gain"
    return key + Markup(' class="{}" style="--t:{:.0f}"').format(name, abs(cell.tint) * _DEEPEST)


def linked(text: str, to: Path) -> str:
    """Turn the ``docs/...md`` of a text into links from a folder, where that folder lies in a tree that has them."""
    start = to.resolve()

    def link(match: re.Match[str]) -> str:
        pages = (root / match[0] for root in (start, *start.parents))
        page = next((p for p in pages if p.is_file()), None)
        return f"[{match[0]}]({Path(os.path.relpath(page, start)).as_posix()})" if page else match[0]

    return _PAGES.sub(link, text)
