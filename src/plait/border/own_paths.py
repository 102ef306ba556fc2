"""Paths of somebody's machine in texts that others will read: shortened to their last part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_PATH = re.compile(r"(?<![\w.:/])(?:~|\.{0,2}/|[A-Za-z]:\\)[^\s,;)'\"]*")


def without_paths(text: str) -> str:
    """Shorten every path in a text to its last part; names on the hub and addresses stay.

    >>> without_paths("read from /home/anna/runs/sst2 (alice/base, https://example.org/x)")
    'read from sst2 (alice/base, https://example.org/x)'
    """
    return _PATH.sub(lambda m: re.split(r"[/\\]", m.group().rstrip("/\\"))[-1] or "(a path)", text)


def scrubbed(value: Any) -> Any:
    """Give a JSON value with every path in its texts, keys aside, shortened to its last part.

    >>> scrubbed({"adapters": [{"path": "/home/anna/sst 2", "weight": 1}]})
    {'adapters': [{'path': 'sst 2', 'weight': 1}]}
    """
    if isinstance(value, Mapping):
        return {key: scrubbed(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if (
        re.match(r"(?:~|\.{0,2}/|[A-Za-z]:\\)", value) and "\n" not in value and "; " not in value
    ):  # a path, blanks and all
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return without_paths(value)
