"""Answers side by side as one page that needs nothing else, and as lines for a terminal."""

from __future__ import annotations

import hashlib
import textwrap
from base64 import b64encode
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from plait.disk.card_contents import base_names
from plait.disk.store import staged_file
from plait.trying.answers import Answer, Asked, Tried

_MARK = b'<meta name="generator" content="plait try">'
_NOBODY = "(not here)"


def write_page(tried: Tried, out: Path, *, overwrite: bool = False) -> Path:
    """Write the page.

    Args:
        tried: The answers.
        out: An .html file.
        overwrite: Whether a page of this command that stands there is replaced.

    Raises:
        UsageError: Something else stands there.
    """
    with staged_file(out, overwrite=overwrite, ours=is_page) as stage:
        stage.write_text(render(tried), encoding="utf-8")
    return out


def is_page(path: Path) -> bool:
    """Whether a file begins as `write_page` begins one."""
    with path.open("rb") as file:
        return _MARK in file.read(2000)


def render(tried: Tried) -> str:
    """Render the page; it names no path of this machine, runs no script and reads nothing from elsewhere."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    css = (Path(__file__).parent / "templates" / "try.css").read_text(encoding="utf-8")
    return environment.get_template("try.html.j2").render(
        tried=tried,
        groups=[(task, list(rows)) for task, rows in groupby(tried.rows, lambda row: row.task or "")],
        base=base_names(tried.base)[1],
        css=css,
        css_hash=b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        shown=lambda answer: _NOBODY if answer is None else answer.text or "(nothing)",
        percent=lambda answer: (
            "" if answer is None or answer.probability is None else f"{100 * answer.probability:.0f} %"
        ),
        alike=alike,
    )


def alike(row: Asked, columns: tuple[str, ...], place: int) -> list[str]:
    """Name the columns before one that answered the same; [] where there are none, or nobody answered.

    >>> row = Asked("how was it?", (Answer("bad"), Answer("good"), Answer("good")))
    >>> alike(row, ("the bare base", "sst2", "the merge"), 2)
    ['sst2']
    """
    own = row.answers[place]
    pairs = zip(columns[:place], row.answers[:place], strict=True)
    return [name for name, other in pairs if own is not None and other is not None and other.text == own.text]


def text_of(tried: Tried, width: int) -> str:
    """Lay out the answers for a terminal.

    Args:
        tried: The answers.
        width: Columns of the terminal.
    """
    lines = [f"{tried.merge} on {tried.base}", *(f"- {note}" for note in tried.notes)]
    lines += [f"- {m.name} is not tried: {m.why}" for m in tried.missing]
    names = max(map(len, tried.columns))
    task = None
    for number, row in enumerate(tried.rows, 1):
        if row.task != task:
            task = row.task
            lines += ["", f"{task}:"]
        lines += ["", *_wrapped(f"{number}. ", row.prompt, width)]
        for name, answer in zip(tried.columns, row.answers, strict=True):
            lines += _wrapped(f"   {name.ljust(names)}  ", _shown(answer), width)
    return "\n".join(lines)


def _shown(answer: Answer | None) -> str:
    if answer is None:
        return _NOBODY
    sure = "" if answer.probability is None else f"  {answer.probability:.2f}"
    return f"{answer.text or '(nothing)'}{sure}"


def _wrapped(first: str, text: str, width: int) -> Iterator[str]:
    """Lines of a text behind a first one's beginning; its own line breaks stay."""
    inside = max(20, width - len(first))
    lines = [part for line in text.splitlines() or [""] for part in textwrap.wrap(line, inside) or [""]]
    for i, line in enumerate(lines):
        yield f"{first if i == 0 else ' ' * len(first)}{line}".rstrip()
