"""Names that become folders and file names: what a task or an adapter may be called."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from plait.errors import InputError, UsageError, printable

_NAME = re.compile(r"[^\W_][\w.+-]{0,99}")
_BYTES = 200  # file systems allow 255, and names get suffixes


def split_name(argument: str | Path) -> tuple[str | None, str]:
    """Split ``NAME=PATH`` into both; a plain path has no name.

    A path that exists is a path, whatever signs it holds; so is one whose first folder holds an equals sign.

    >>> split_name("reviews=adapters/sst2"), split_name("adapters/sst2"), split_name("runs/lr=1e-4")
    (('reviews', 'adapters/sst2'), (None, 'adapters/sst2'), (None, 'runs/lr=1e-4'))
    """
    text = str(argument)
    name, equals, path = text.partition("=")
    return (name, path) if equals and "/" not in name and not Path(text).exists() else (None, text)


def checked_name(name: str, what: str = "name") -> str:
    """Check that a name fits a folder on any system, and give it in Unicode normal form C.

    Raises:
        UsageError: It is empty, over 100 characters or 200 bytes, starts with anything but a letter or digit, or holds
            anything but letters, digits and ``_ . + -``.

    >>> checked_name("sst2-v1.1")
    'sst2-v1.1'
    """
    normal = unicodedata.normalize("NFC", name)
    if not _NAME.fullmatch(normal) or normal.endswith(".") or len(normal.encode()) > _BYTES:
        raise UsageError(
            f"{what} {printable(name, 60)!r} cannot name a folder",
            hint="letters, digits and _ . + - only, at most 100, starting with a letter or digit; NAME=DIR gives a folder another name",
        )
    return normal


def checked_in_file(name: str, what: str, where: str, hint: str) -> str:
    """As `checked_name`, of a name that a file gives: then the file is at fault, not the call.

    Raises:
        InputError: Names the file.
    """
    try:
        return checked_name(name, what)
    except UsageError as e:
        raise InputError(e.what, where=where, hint=hint) from None


def distinct_names(names: Sequence[str], what: str = "name") -> list[str]:
    """The names, checked, none twice even where case or Unicode form is ignored."""
    seen: dict[str, str] = {}
    for name in (checked_name(n, what) for n in names):
        key = unicodedata.normalize("NFKC", name).casefold()
        if key in seen:
            raise UsageError(f"{what} {name!r} and {seen[key]!r} collide", hint="give one another name: NAME=DIR")
        seen[key] = name
    return list(seen.values())
