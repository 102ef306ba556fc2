"""The shortest way from `plait inspect` to what it tells: no parser of options is imported, and torch only where NumPy cannot do.

Everything that goes wrong is left to the whole command line, which meets it again and tells it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

_FLAGS = {"--json", "--full"}


def inspected(arguments: Sequence[str]) -> int | None:
    """Answer the arguments of `plait inspect`; the exit code, or None where the whole command line is to answer.

    Args:
        arguments: What follows `inspect`.
    """
    paths = [a for a in arguments if not a.startswith("-")]
    flags = {a for a in arguments if a.startswith("-")}
    if len(paths) != 1 or not paths[0] or flags - _FLAGS:
        return None
    from plait.border.spoken import spoken
    from plait.formats.inspect import inspect
    from plait.formats.inspect_words import inspection_text

    try:
        inspection = inspect(Path(paths[0]), full="--full" in flags)
        as_json = "--json" in flags
        said = spoken(inspection, as_json, "" if as_json else inspection_text(inspection))
        sys.stdout.write(said + "\n")
        sys.stdout.flush()
    except Exception:  # nothing was changed; the whole command line meets it again, and tells it
        return None
    return 0
