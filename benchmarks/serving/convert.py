"""llama.cpp's converter of adapters, called for many folders by one process: its imports take longer than its work.

Reads [[argument, ...], ...] on standard input, runs the script named on the command line for each, prints [null or why, ...].
"""

from __future__ import annotations

import contextlib
import json
import logging
import runpy
import sys

errors: list[str] = []


class Kept(logging.Handler):
    """What the converter logs as an error before it stops."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        errors.append(record.getMessage())


def converted(script: str, arguments: list[str]) -> str | None:
    """Run the script as if it had been called; why it stopped, or None."""
    errors.clear()
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as done:
        return None if not done.code else "; ".join(errors) or f"exit code {done.code}"
    except Exception as e:  # whatever stops it, the folder is not converted
        return f"{type(e).__name__}: {e}"
    return None


def main() -> None:
    logging.getLogger().addHandler(Kept(logging.ERROR))
    script = sys.argv[1]
    with contextlib.redirect_stdout(sys.stderr):
        found = [converted(script, arguments) for arguments in json.load(sys.stdin)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
