"""How commands speak: results on stdout (one JSON object with --json), everything else on stderr, one line an error."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from plait.border.spoken import SCHEMA as SCHEMA
from plait.border.spoken import jsonable as jsonable
from plait.border.spoken import spoken
from plait.disk.locks import STEPS, shut_from
from plait.errors import (
    AGAIN,
    INTERRUPTED,
    TERMINATED,
    EnvironmentFault,
    InputError,
    PlaitError,
    RunError,
    Terminated,
    UsageError,
    printable,
)

_NO_SUCH = "No such option:? '?"  # how the parser's releases begin, the older ones with quotes
_TORCH_WRITES = (
    "iostream error",
    "PytorchStreamWriter failed",
    "inline_container.cc",
)  # how torch.save says that the disk is full


def emit(result: Any, as_json: bool, text: str) -> None:
    """Print a result, a record or a mapping: as JSON, or the text a person reads."""
    typer.echo(spoken(result, as_json, text))


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


def guarded(
    call: Callable[[], int | None],
    *,
    debug: bool,
    as_json: bool,
    begin: Callable[[], Callable[[], int]] | None = None,
) -> int:
    """Run a command and turn what it raises into one line, one object with `--json`, and an exit code."""
    interrupted: Callable[[], int] | None = None
    try:
        interrupted = begin() if begin else None
        code = call() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing more to say
        return 0
    except KeyboardInterrupt as e:
        return _interrupted(e, as_json, terminated=isinstance(e, Terminated))
    except Exception as e:
        if debug:
            traceback.print_exception(e)
        if interrupted is not None and (code := interrupted()):  # an import that it stopped fails in ways of its own
            return _interrupted(e, as_json, terminated=code == TERMINATED)
        error = foreseen(e) or RunError(f"{type(e).__name__}: {e}", hint="unexpected; --debug shows the traceback")
        _tell(f"error: {error}", *_notes(e))
        return _object(error.exit_code, type(error).__name__, error, as_json)


def _interrupted(error: BaseException, as_json: bool, *, terminated: bool) -> int:
    kind, what, code = ("Terminated", "terminated", TERMINATED)
    if not terminated:
        kind, what, code = ("KeyboardInterrupt", "interrupted", INTERRUPTED)
    _tell(f"{what}; {AGAIN}", *_notes(error))
    return _object(code, kind, RunError(what), as_json)


def foreseen(error: Exception) -> PlaitError | None:
    """The error as one of plait's own; None for one that nobody foresaw."""
    if isinstance(error, PlaitError):
        return error
    if hasattr(error, "format_message"):  # the argument parser's
        message = " ".join(str(error.format_message()).split())
        place = getattr(getattr(error, "ctx", None), "command_path", None) or "plait"
        return UsageError(message, hint=_way_on(message, place))
    if isinstance(error, ModuleNotFoundError):
        hint = "pip install the extra it belongs to: plait[demo], plait[test]"
        return EnvironmentFault(f"the package {error.name!r} is not installed", hint=hint)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # of an output, `system_errors` says it
        return InputError(
            "no such file or folder: its name is too long", where=str(error.filename or ""), hint="check the path"
        )
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error.strerror):
        hint = "a full disk, or a limit on file sizes (ulimit -f)? TMPDIR=FOLDER names another"
        return EnvironmentFault("no folder takes temporary files", hint=hint)
    if isinstance(error, PermissionError) and error.filename and (shut := shut_from(Path(os.fsdecode(error.filename)))):
        return shut  # outputs are told by `system_errors`
    if isinstance(error, OSError) and error.errno in STEPS:
        return EnvironmentFault(error.strerror or str(error), where=str(error.filename or ""), hint=STEPS[error.errno])
    if any(words in str(error) for words in _TORCH_WRITES) and isinstance(error, RuntimeError):
        return EnvironmentFault("a checkpoint cannot be written", hint="is the disk full?")
    if type(error).__name__ == "SafetensorError" and "os error" in str(error):
        return EnvironmentFault(str(error), hint="is the disk full?")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error)):
        first = (str(error) or "out of memory").splitlines()[0]
        return EnvironmentFault(first, hint="smaller batches, fewer rows, or --device cpu")
    return None


def _way_on(message: str, place: str) -> str:
    """What to type after a line that the argument parser does not understand."""
    if re.search(rf"{_NO_SUCH}-\d", message):  # a negative weight, given apart from the others
        return "numbers are one list: --weights 1,-1"
    if place == "plait merge" and (option := re.search(rf"{_NO_SUCH}--([\w-]+)", message)):
        from plait.merging.listed import merge_list

        name = option[1].replace("-", "_")
        if any(name in method.options for method in merge_list().values()):
            return f"it is an option of methods: --set {name}=VALUE; plait ls merges shows which have it"
    return f"{place} --help"


def _object(code: int, kind: str, error: PlaitError, as_json: bool) -> int:
    """Print an error as the one object of `--json`, and give the code back."""
    if as_json:
        found = {"kind": kind, "what": error.what, "where": error.where, "hint": error.hint, "exit_code": code}
        with contextlib.suppress(OSError):  # a closed stdout must not change the exit code
            typer.echo(json.dumps({"schema": SCHEMA, "error": found}))
    return code


def _tell(*lines: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nor a closed stderr
        sys.stderr.write("".join(printable(line, 2000) + "\n" for line in lines))


def _notes(error: BaseException) -> list[str]:
    """What was added to an error on its way, such as where that is kept which was done."""
    return list(getattr(error, "__notes__", ()))


def settings(pairs: list[str] | None) -> dict[str, Any]:
    """``--set key=value`` pairs as a mapping; values are YAML."""
    found: dict[str, Any] = {}
    for pair in pairs or []:
        from plait.border.yaml_text import load_yaml

        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {printable(pair)!r} is not key=value")
        if key in found:
            raise UsageError(f"--set {key} stands twice")
        found[key] = load_yaml(value, f"--set {key}")
    return found


def number(text: str, what: str) -> float:
    """One finite number; raises as `numbers`."""
    found = numbers(text, what) or []
    if len(found) != 1:
        raise UsageError(f"{what} {printable(text, 60)!r} is not a number", hint="such as 0.7")
    return found[0]


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
