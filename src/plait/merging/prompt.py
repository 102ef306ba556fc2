"""The shortest way from a plain `plait merge` to its result: no parser of options is imported, no torch.

Only what is spelt out here is understood; everything else, and everything that goes wrong, is left to the whole command line,
which understands the same in the same way and tells errors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plait.merging.request import MergeRequest

_VALUES = {
    "--method": "method",
    "-m": "method",
    "--weights": "weights",
    "--scale": "scale",
    "--out": "out",
    "--dtype": "dtype",
}
_FLAGS = {"--json", "--overwrite", "--no-verify", "--verify", "--disjoint"}
_SUMS = ("linear", "cat", "task_arithmetic")


def merged(arguments: Sequence[str], begin: Callable[[], object]) -> int | None:
    """Answer the arguments of `plait merge` where they ask for a plain sum; the exit code, or None where they do not.

    Args:
        arguments: What follows `merge`.
        begin: Called before anything is written.
    """
    parsed = _parsed(arguments)
    if parsed is None:
        return None
    request, as_json = parsed
    from plait.merging.light.of_folders import sum_of_folders

    begin()
    try:
        written = sum_of_folders(request)
        if written is None and request.folders[0].endswith(".safetensors"):
            from plait.merging.light.of_files import sum_of_files

            written = sum_of_files(request)
    except Exception:  # it left nothing; the whole command line meets it again, and tells it
        return None
    if written is None:
        return None
    from plait.border.spoken import spoken

    text = ""
    if not as_json:
        from plait.merging.words import words_of

        text = words_of(written)
    sys.stdout.write(spoken(written, as_json, text) + "\n")
    sys.stdout.flush()
    return 0


def _parsed(arguments: Sequence[str]) -> tuple[MergeRequest, bool] | None:
    """The request that the arguments spell out, and whether JSON is wanted; None where one of them is not understood here."""
    values: dict[str, str] = {}
    flags: set[str] = set()
    folders: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if argument in _FLAGS:
            flags.add(argument)
        elif option in _VALUES and option.startswith("--") and equals:
            values[_VALUES[option]] = value
        elif argument in _VALUES:
            if (following := next(rest, None)) is None:
                return None
            values[_VALUES[argument]] = following
        elif argument.startswith("-"):
            return None
        else:
            folders.append(argument)
    weights = _numbers(values["weights"]) if "weights" in values else None
    scale = _numbers(values["scale"]) if values.get("scale", "auto") != "auto" else None
    unclear = ("weights" in values and not weights) or (scale is None and values.get("scale", "auto") != "auto")
    several = (scale is not None and len(scale) != 1) or {"--verify", "--no-verify"} <= flags
    if len(folders) < 2 or values.get("method") not in _SUMS or not values.get("out") or unclear or several:
        return None
    if folders[0] == "auto" or any(f.endswith((".yaml", ".yml")) for f in folders):
        return None
    from plait.merging.request import MergeRequest
    from plait.merging.spec import MergeSpec

    spec = MergeSpec(
        values["method"], weights=weights, scale=scale[0] if scale else None, disjoint="--disjoint" in flags
    )
    verify, overwrite = "--no-verify" not in flags, "--overwrite" in flags
    request = MergeRequest(
        folders, Path(values["out"]), spec, dtype=values.get("dtype", "keep"), verify=verify, overwrite=overwrite
    )
    return request, "--json" in flags


def _numbers(text: str) -> list[float] | None:
    """A list of finite numbers; None where it is none."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return found if all(map(math.isfinite, found)) else None
