"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; cells are plain text."""
    shown = [" | ".join(cells) for cells in [header, ["---"] * len(header), *lines]]
    return "\n".join(f"| {line} |" for line in shown)
