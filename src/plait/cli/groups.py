"""Which group of a help page an option stands in, by its name: the same in every command."""

from __future__ import annotations

from collections.abc import Iterable

INPUTS, METHOD, TEXTS, RESULT, RUNNING, OTHER = (
    "What goes in", "How it is done", "By texts, without labels", "What comes out", "Where and how it runs", "Options"
)  # fmt: skip
GROUPS = (INPUTS, METHOD, TEXTS, RESULT, RUNNING)

_OPTIONS = {
    INPUTS: """base task recipe root train-file validation-file validation text-column label kind own others background statistics
        stats initial input add remove component stack disjoint samples adapter prompt prompts sets""",
    METHOD: """method set scale scales weights weight rank calibrate alpha row-norm task-type background-weight energy drop
        target-modules rename drop-bias layout by-difference fleet pool sketch memory output-gradients labels base-4bit tolerate against
        answers chat tokens private""",
    TEXTS: "text general refine fit heads learn-heads repair on-policy max-shift max-length",
    RESULT: """out to format dtype bake per-task rank-curve for verify overwrite json quiet about page dry-run""",
    RUNNING: "device seed executor workers scorers seconds offline debug",
}
_GROUP = {f"--{name}": group for group, names in _OPTIONS.items() for name in names.split()}


def group_of(options: Iterable[str]) -> str:
    """The group of an option, given all its spellings; `OTHER` where none is known, as of --help."""
    return next((_GROUP[o] for o in options if o in _GROUP), OTHER)
