"""What of a choice still holds when it is asked for otherwise: an option reaches some of its steps, and what was done in others stays."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import UsageError

# Pieces of a checkpoint, in the order in which they are made.
ANSWERS, SCORES, WEIGHING, WEIGHTS, FIT, MERGE, REPAIR, FINISHING = (
    "answers",
    "scores",
    "weighing",
    "weights",
    "fit",
    "merge",
    "repair",
    "finishing",
)
# What is done to a choice afterwards.
THE_REPAIR, LEARNT_HEADS, THE_HEADS = "the repair", "learnt heads", "the heads"

_AFTERWARDS = frozenset((REPAIR, THE_REPAIR, LEARNT_HEADS, THE_HEADS))
_FROM_SCORES = _AFTERWARDS | {SCORES, WEIGHING, WEIGHTS, FIT, MERGE}
EVERYTHING = _FROM_SCORES | {ANSWERS}
# What each part of an identity reaches; what is not listed reaches everything.
_REACHED = {
    "options.methods": _FROM_SCORES,
    "options.scales": _FROM_SCORES,
    "options.max_shift": _FROM_SCORES,
    "inputs.general": _FROM_SCORES,
    "seed": _AFTERWARDS | {WEIGHING, WEIGHTS, MERGE},
    "options.refine": _AFTERWARDS | {WEIGHING, WEIGHTS, MERGE},
    "options.fit": _AFTERWARDS | {MERGE},
    "options.rank": _AFTERWARDS | {FIT, MERGE},
    "options.cut": _AFTERWARDS | {FIT, MERGE},
    "options.repair": _AFTERWARDS,
    "options.repair_from": _AFTERWARDS,
    "options.heads": frozenset((THE_REPAIR, THE_HEADS)),  # a repair is judged with the heads that will follow
    "options.learn_heads": frozenset((LEARNT_HEADS, THE_HEADS)),
    "options.dtype": frozenset[str](),  # of the file alone
}
_FLAGS = {"new_tokens": "--tokens", "repair_from": "--repair", "methods": "methods", "scales": "scales"}
_ABSENT = {"learn_heads": False, "on_policy": False, "repair_from": 0}
_SAID = {
    ANSWERS: "what the adapters write",
    SCORES: "scores of merges",
    WEIGHTS: "learnt weights",
    FIT: "the fits",
    MERGE: "the choice",
}
_LEARNING = {WEIGHING: "learning weights", REPAIR: "the repair"}


@dataclass(frozen=True, slots=True)
class Change:
    """How a choice is asked for now, beside how it was when it was begun.

    Args:
        said: What differs, a phrase each.
        reached: Names of the pieces, and of what is done afterwards, that do not hold any more.
    """

    said: tuple[str, ...] = ()
    reached: frozenset[str] = frozenset()

    @classmethod
    def of(cls, before: Mapping[str, Any], now: Mapping[str, Any]) -> Change:
        """Compare two identities, each a result's with its state (`plait.learning.checkpoints.state_of`)."""
        if not before:
            return cls(("it does not say what it was made from",), EVERYTHING)
        a, b = _flat(before), _flat(now)
        differing = [key for key in {**b, **a} if a.get(key) != b.get(key)]
        reached = frozenset[str]().union(*(_REACHED.get(key, EVERYTHING) for key in differing))
        words = (_words(key, before, now) for key in sorted(differing))
        return cls(tuple(dict.fromkeys(filter(None, words))), reached)

    def holds(self, name: str, values: Mapping[str, Any]) -> bool:
        """Whether a piece still holds.

        Args:
            name: Its name.
            values: What it says of itself: after which steps a merge is what it is.
        """
        return self.reached.isdisjoint((name, *values.get("after", ())))


def described(pieces: Mapping[str, Mapping[str, Any]]) -> str:
    """Say in words what is done, given each piece's name and what it says of itself; "" where nothing is."""
    words = [_SAID[name] for name in _SAID if name in pieces]
    if MERGE in pieces:  # all that led to it is behind
        words = [_SAID[MERGE]]
    words += pieces.get(FINISHING, {}).get("after", ())
    words += [f"the first {pieces[name]['step']} steps of {what}" for name, what in _LEARNING.items() if name in pieces]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def are_there(said: str) -> str:
    """Put what is done into a clause.

    >>> are_there("the choice"), are_there("the choice and the repair"), are_there("the fits")
    ('the choice is there', 'the choice and the repair are there', 'the fits are there')
    """
    return f"{said} {'are' if ' and ' in said or said.endswith('s') else 'is'} there"


def begun_otherwise(out: Path, checkpoint: Path, change: Change, done: str, lost: str) -> UsageError:
    """Make the error that says what would be lost, where nobody has asked for that.

    Args:
        out: The output.
        checkpoint: The newest checkpoint.
        change: How it is asked for now.
        done: What is done, in words; "" where nobody can tell.
        lost: What of it does not hold any more; "" for all.
    """
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(checkpoint.stat().st_mtime))
    there = f" (last kept {when}: {are_there(done)})" if done else f" (last kept {when})"
    loses = f" {lost} would be lost" if lost else " all of it would be lost"
    rest = "goes on from what still holds" if lost else "begins anew"
    return UsageError(
        f"merge auto was begun there with other settings{there}, and with these ({'; '.join(change.said)}){loses}",
        where=str(out),
        hint=f"the settings of before go on from it; --overwrite {rest}; or choose another --out",
    )


def _flat(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """Every part of an identity by the name that the table has for it."""
    found: dict[str, Any] = {}
    for key, value in identity.items():
        found |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def _words(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say how one part differs, as a person knows it."""
    part, _, name = key.partition(".")
    old, new = (_part(x, part, name) for x in (before, now))
    if part == "inputs":
        return _of_input(name, name in old, name in new)
    if key in ("options.repair", "options.repair_from"):
        return f"--repair {_steps(old)} -> {_steps(new)}"
    if key == "options.cut":  # goes with the rank
        return ""
    if key == "state.format":
        return "another build of plait"
    values = " -> ".join(_value(x.get(name, _ABSENT.get(name))) for x in (old, new))
    flag = name if part == "state" else _FLAGS.get(name, f"--{(name or part).replace('_', '-')}")
    return f"{flag} {values}"


def _part(identity: Mapping[str, Any], part: str, name: str) -> Mapping[str, Any]:
    """A part of an identity as a mapping, also where it is one value."""
    return (identity.get(part) or {}) if name else {name: identity.get(part)}


def _of_input(name: str, was: bool, is_there: bool) -> str:
    kind, _, whose = name.partition(":")
    what = {"adapter": f"adapter {whose}", "hub": f"adapter {whose}", "texts": f"texts of {whose}"}.get(kind)
    what = what or ("general texts" if kind == "general" else f"the {name}")
    if was and is_there:
        return f"other {what}" if kind in ("texts", "general") else f"{what} is another"
    return f"{what} {'new' if is_there else 'left out'}"


def _steps(options: Mapping[str, Any]) -> str:
    return "auto" if options.get("repair_from") else str(options.get("repair"))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)
