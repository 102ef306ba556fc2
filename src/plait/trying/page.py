"""Answers side by side as one page that needs nothing else, and as lines for a terminal."""

from __future__ import annotations

import hashlib
import textwrap
from base64 import b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path

from plait.disk.card_contents import base_names
from plait.disk.store import staged_file
from plait.trying.records import Answer, Asked, Tried

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
        prompts=by_prompt(tried.rows),
        base=base_names(tried.base)[1],
        css=css,
        css_hash=b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        shown=lambda answer: _NOBODY if answer is None else answer.text or "(nothing)",
        percent=lambda answer: (
            "" if answer is None or answer.probability is None else f"{100 * answer.probability:.0f} %"
        ),
        alike=alike,
    )


def by_prompt(rows: Sequence[Asked]) -> list[list[Asked]]:
    """Put together what the heads of several tasks answer to one prompt; every other row stays alone.

    >>> rows = [Asked("dull", (), "mood"), Asked("dull", (), "topic"), Asked("dull", (), "topic")]
    >>> [[row.task for row in group] for group in by_prompt(rows)]
    [['mood', 'topic'], ['topic']]
    """
    groups: list[list[Asked]] = []
    for row in rows:
        same = bool(groups) and groups[-1][0].prompt == row.prompt
        if same and row.task is not None and row.task not in [other.task for other in groups[-1]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


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
    names = max(len(name) for row in tried.rows for name in row.columns or tried.columns)
    tasks = max((len(row.task) + 2 for row in tried.rows if row.task), default=0)
    for number, group in enumerate(by_prompt(tried.rows), 1):
        lines += ["", *_wrapped(f"{number}. ", group[0].prompt, width)]
        for row in group:
            for i, (name, answer) in enumerate(zip(row.columns or tried.columns, row.answers, strict=True)):
                task = (row.task or "" if i == 0 else "").ljust(tasks)
                lines += _wrapped(f"   {task}{name.ljust(names)}  ", _shown(answer), width)
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
