"""What can go wrong, as types: each carries what happened, where, and the next step, and maps to one exit code."""

from __future__ import annotations

from collections.abc import Mapping

# Exit codes of a command that Ctrl-C and SIGTERM have ended, as shells have them, and what is said then.
INTERRUPTED, TERMINATED = 130, 143
AGAIN = "run the same command again to go on"


class Terminated(KeyboardInterrupt):
    """SIGTERM has come, as a scheduler sends it before it kills: what was begun is cleared away as for Ctrl-C."""


class PlaitError(Exception):
    """Base of every error plait raises on purpose.

    Args:
        what: What happened, in one sentence, with what was expected and what was found.
        where: The adapter, file, module or recipe key it happened in.
        hint: The next step for the reader.
    """

    exit_code = 1
    longest = 400  # characters of `what` that are shown

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        place = f"{printable(self.where)}: " if self.where else ""
        step = f" ({printable(self.hint)})" if self.hint else ""
        return f"{place}{printable(self.what, self.longest)}{step}"


class RunError(PlaitError):
    """The inputs were fine and the computation failed."""

    exit_code = 1


class Diverged(RunError):  # noqa: N818 (what happened, as the field says it)
    """The loss of a training became NaN or infinite, or of some trainings among many.

    Args:
        lost: Of many: folder of each that was to be written -> what happened to it.
    """

    def __init__(
        self, what: str, *, where: str | None = None, hint: str | None = None, lost: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.lost = dict(lost or {})


class UsageError(PlaitError):
    """A wrong call: an unknown method, an option out of range, a recipe that does not say what it means."""

    exit_code = 2


class Unfinished(UsageError):  # noqa: N818 (what it is)
    """Something stands where a result goes that holds no manifest, so plait did not finish it."""


class InputError(PlaitError):
    """A file or folder that cannot be used: damaged, incomplete, of another base, of a refused kind."""

    exit_code = 3


class Damaged(InputError):  # noqa: N818 (what happened to it)
    """A result of plait's own that is not what was written: files changed or gone, or a manifest that is."""


class EnvironmentFault(PlaitError):  # noqa: N818 (EnvironmentError is a builtin)
    """Disk, memory, GPU, network or a missing extra."""

    exit_code = 4


def printable(text: object, limit: int = 400) -> str:
    """Make foreign text safe for one terminal line: control characters escaped, length bounded."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
