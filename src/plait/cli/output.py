"""How commands speak: results on stdout (one JSON object with --json), everything else on stderr, one line an error."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import typer

from plait.errors import EnvironmentFault, PlaitError, RunError, UsageError, printable

SCHEMA = 1


def emit(result: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Print a result: the object, or the text a person reads."""
    typer.echo(
        json.dumps(jsonable({"schema": SCHEMA, **result}), allow_nan=False, ensure_ascii=True) if as_json else text
    )


def jsonable(value: Any) -> Any:
    """The same value as JSON can hold it: NaN and infinity as null, paths and tuples as text and lists."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def table(header: list[str], rows: list[list[str]], *, text_columns: int = 1) -> str:
    """Columns of plain text, the first ones left-aligned, the others right-aligned."""
    width = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * w for w in width], *rows]:
        cells = [
            c.ljust(w) if i < text_columns else c.rjust(w) for i, (c, w) in enumerate(zip(row, width, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def guarded(call: Callable[[], int | None], *, debug: bool, as_json: bool) -> int:
    """Run a command and turn what it raises into one line and an exit code."""
    try:
        return call() or 0
    except PlaitError as e:
        return _fail(e, debug, as_json)
    except KeyboardInterrupt:
        _line("interrupted; run the same command again to go on")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing more to say
        return 0
    except MemoryError as e:
        return _fail(EnvironmentFault(f"out of memory: {e}", hint="smaller batches, fewer rows"), debug, as_json)
    except ModuleNotFoundError as e:
        hint = "pip install the extra it belongs to: plait[demo], plait[test]"
        return _fail(EnvironmentFault(f"the package {e.name!r} is not installed", hint=hint), debug, as_json)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG):
            raise
        return _fail(EnvironmentFault(e.strerror or str(e), where=str(e.filename or "")), debug, as_json)
    except RuntimeError as e:
        if "out of memory" not in str(e):
            raise
        return _fail(EnvironmentFault(str(e).splitlines()[0], hint="smaller batches, or --device cpu"), debug, as_json)


def _fail(error: PlaitError, debug: bool, as_json: bool) -> int:
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    _line(f"error: {error}")
    if as_json:
        found = {"kind": type(error).__name__, "what": error.what, "where": error.where, "hint": error.hint}
        typer.echo(json.dumps({"schema": SCHEMA, "error": found}))
    return error.exit_code


def _line(text: str) -> None:
    try:
        sys.stderr.write(printable(text, 2000) + "\n")
    except (OSError, ValueError):  # a closed stderr must not change the exit code
        return


def unexpected(error: BaseException) -> int:
    """An error nobody foresaw: one line, and how to see the rest."""
    _line(f"error: {type(error).__name__}: {error} (unexpected; --debug shows the traceback)")
    return RunError.exit_code


def settings(pairs: list[str] | None) -> dict[str, Any]:
    """``--set key=value`` pairs as a mapping; values are YAML."""
    from plait.recipe_file import load_yaml

    found: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {printable(pair)!r} is not key=value")
        if key in found:
            raise UsageError(f"--set {key} stands twice")
        found[key] = load_yaml(value, f"--set {key}")
    return found


def numbers(text: str | None, what: str) -> list[float] | None:
    """A comma-separated list of finite numbers.

    Raises:
        UsageError: Empty, not numbers, NaN or infinite.
    """
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{what} {printable(text, 60)!r} is not a list of numbers", hint="such as 0.5,1,2") from None
    if not all(math.isfinite(v) for v in found):
        raise UsageError(f"{what} must be finite")
    return found
