"""The process behind `plait study run --executor processes`: batches as lines on stdin, an answer a line on stdout."""

from __future__ import annotations

import sys
from typing import TextIO

from plait.cli.output import guarded
from plait.runs.executors import serve


def _line(stream: TextIO, text: str) -> None:
    stream.write(text + "\n")
    stream.flush()


def main() -> int:
    """Serve until stdin ends; errors as the command line tells them."""

    def answer(text: str) -> None:
        _line(sys.stdout, text)

    def tell(text: str) -> None:
        _line(sys.stderr, text)

    return guarded(lambda: serve(sys.stdin, answer, tell), debug=False, as_json=False)


if __name__ == "__main__":
    sys.exit(main())
