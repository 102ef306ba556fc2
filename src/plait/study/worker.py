"""The process behind `plait study run --executor processes`: batches as lines on stdin, an answer a line on stdout."""

from __future__ import annotations

import sys

from plait.cli.output import guarded
from plait.study.executor import serve


def _line(stream: object, text: str) -> None:
    stream.write(text + "\n")  # type: ignore[attr-defined]
    stream.flush()  # type: ignore[attr-defined]


def main() -> int:
    """Serve until stdin ends; errors as the command line tells them."""
    return guarded(
        lambda: serve(sys.stdin, lambda t: _line(sys.stdout, t), lambda t: _line(sys.stderr, t)),
        debug=False,
        as_json=False,
    )


if __name__ == "__main__":
    sys.exit(main())
