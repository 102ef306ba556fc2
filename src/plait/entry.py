"""Where the command begins: from here on Ctrl-C and SIGTERM end it with one line and their exit code, also while it still imports."""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # built in; signal itself imports enum first, which takes longer
import atexit
import gc
import os
import sys

from plait.errors import AGAIN, INTERRUPTED, TERMINATED, Terminated

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# MKL, with which torch multiplies, adds up a product of few rows in another order with another number of threads unless it is told not to.
SAME_PRODUCTS = ("MKL_CBWR", "AUTO,STRICT")
# How often a thread of OpenMP, with which torch computes, looks for more work before it sleeps: for a fraction of a millisecond. libgomp's
# own 300,000 times keep a core busy for milliseconds behind every product, and on a machine with other work most of the time.
SHORT_WAITS = ("GOMP_SPINCOUNT", "5000")
# New objects after which Python looks for cycles among the young ones, and how often among all: by default after 700, so that it looks
# 400 times while torch is imported, whose million objects all stay, and reading many adapters after it takes half as long again.
SELDOM = (20_000, 50, 100)


def leave_at_once() -> None:
    """Have an interrupt end the process on the spot: before anything is written, nothing has to be undone."""

    def leave(number: int, frame: object) -> None:
        kind, what, code = ("Terminated", "terminated", TERMINATED)
        if number == signal.SIGINT:
            kind, what, code = ("KeyboardInterrupt", "interrupted", INTERRUPTED)
        _write(2, f"{what}; {AGAIN}\n")
        if "--json" in sys.argv:
            error = f'{{"kind": "{kind}", "what": "{what}", "where": null, "hint": null, "exit_code": {code}}}'
            _write(1, f'{{"schema": 1, "error": {error}}}\n')
        os._exit(code)

    _handle(leave)


def raise_again() -> Callable[[], int]:
    """Have an interrupt raise `KeyboardInterrupt` again, or `Terminated`: from here on what was begun is cleared away.

    Returns:
        Asked, the exit code of the interrupt that has come since, 0 for none: imports turn some into errors of their own.
    """
    seen: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        seen.append(INTERRUPTED if number == signal.SIGINT else TERMINATED)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    _handle(interrupt)
    return lambda: seen[-1] if seen else 0


def _handle(handler: Callable[[int, object], None]) -> None:
    """Where signals are ignored (Ctrl-C by a job in the background of a shell) they stay ignored."""
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.SIG_DFL, None):
        signal.signal(signal.SIGINT, handler)
    if signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, None):
        signal.signal(signal.SIGTERM, handler)


def _write(descriptor: int, text: str) -> None:
    try:  # noqa: SIM105 (contextlib is one more import to be interrupted in)
        os.write(descriptor, text.encode())
    except OSError:  # a closed stream
        pass


def main() -> None:
    """Run the command line."""
    leave_at_once()
    gc.set_threshold(*SELDOM)
    # At its end Python goes through all objects twice more, for a third of a second with torch; the process takes them with it anyway.
    atexit.register(gc.freeze)
    os.environ.setdefault(*SAME_PRODUCTS)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(*SHORT_WAITS)
    if sys.argv[1:2] in (["merge"], ["inspect"]):
        # NumPy multiplies narrow matrices here, for which its threads wait for each other longer than they compute.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if sys.argv[1:2] == ["merge"]:
        from plait.merging.prompt import merged

        if (code := merged(sys.argv[2:], raise_again)) is not None:
            leave_at_once()
            sys.exit(code)
        leave_at_once()
    if sys.argv[1:2] == ["inspect"]:
        from plait.formats.prompt import inspected

        if (code := inspected(sys.argv[2:])) is not None:
            sys.exit(code)
    if not sys.warnoptions:
        import warnings

        # What a library will change is for those who write against it; python -W default shows it.
        warnings.simplefilter("ignore", FutureWarning)
    from plait.cli import main as run

    run(begin=raise_again, end=leave_at_once)


if __name__ == "__main__":
    main()
