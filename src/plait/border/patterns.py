"""PEFT's patterns (rank_pattern, alpha_pattern, targets) matched as Python's `re` does it, in bounded time.

Python's engine backtracks: `.*.*.*.*zz` on a name of 400 characters takes minutes, and both come from whoever wrote the
adapter. Here most patterns (names, with or without dots) are looked up, the others run through an automaton whose time
is linear in the name, and the few that no automaton expresses (lookarounds, references) are matched by `re` itself in a
child process that has a time limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Sequence

from plait.border.automaton import Automaton, Budget, Unsupported
from plait.errors import InputError, PlaitError, printable

LONGEST_PATTERN = 2000
_MOST_TEXT = 50_000  # of all keys that are no plain names; Python compiles 200 characters in a millisecond
SECONDS = 5.0  # of the child processes, over all patterns and names
_MOST_STEPS = 10_000_000  # over all patterns and names: some seconds
_FRAME = r"(.*\.)?(KEY)$"  # how PEFT looks a module up among the keys
_NO_META = re.compile(r"[^\\^$*+?{}\[\]|()\n]*")
_CHILD = "import json,re,sys; p,n=json.load(sys.stdin); print(json.dumps([bool(re.{how}(p,x)) for x in n]))"


def first_hits(keys: Iterable[str], names: Sequence[str], *, where: str, what: str) -> dict[str, str]:
    r"""Name -> the first key that matches it as ``(.*\.)?(KEY)$``, for the names that any key matches, as PEFT has it.

    Args:
        keys: Patterns in PEFT's order.
        names: Module names.
        where: The file they stand in.
        what: The option they are keys of, such as "rank_pattern".

    Raises:
        InputError: A key is no regex in that place, is too long, or takes too long.

    Cost: linear in the names and the keys without special characters; keys times names for the others, within limits.
    """
    order = {key: i for i, key in enumerate(keys)}
    require_patterns(order, where, what)
    budget = Budget(_MOST_STEPS, SECONDS)
    try:
        hits = _plain_hits([k for k in order if _NO_META.fullmatch(k)], order, names, budget)
    except TimeoutError:
        raise _slow(what, where, InputError) from None
    for key in (k for k in order if not _NO_META.fullmatch(k)):
        left = [n for n in names if n not in hits or order[hits[n]] > order[key]]
        found = matches(_FRAME.replace("KEY", key, 1), left, where=where, what=f"{what}[{key}]", budget=budget)
        hits |= {n: key for n, hit in zip(left, found, strict=True) if hit}
    return hits


def require_patterns(keys: Iterable[str], where: str, what: str) -> None:
    """Refuse keys of `what` that are no regex in the place where PEFT puts them, or longer than any that people write.

    Raises:
        InputError: Names the key.
    """
    hint, total = "name the modules plainly", 0
    for key in keys:
        place = f"{what}[{printable(key, 80)}]"
        if len(key) > LONGEST_PATTERN:
            raise InputError(f"{place} has {len(key)} characters, at most {LONGEST_PATTERN}", where=where, hint=hint)
        if _NO_META.fullmatch(key):
            continue
        total += len(key)
        if total > _MOST_TEXT:
            raise InputError(f"the regexes of {what} have over {_MOST_TEXT} characters", where=where, hint=hint)
        try:
            with warnings.catch_warnings():  # of sets in sets, which mean what they mean
                warnings.simplefilter("ignore")
                re.compile(_FRAME.replace("KEY", key, 1))
        except (re.error, RecursionError, OverflowError, ValueError) as e:
            raise InputError(f"{place} is not a regex: {e}", where=where, hint=hint) from None


def matches(
    pattern: str,
    names: Sequence[str],
    *,
    where: str,
    what: str,
    kind: type[PlaitError] = InputError,
    budget: Budget | None = None,
) -> list[bool]:
    """Whether `re.match` would match each name, without its worst case.

    Args:
        pattern: A regex that compiles.
        names: What it is matched against, from the beginning of each.
        where: The file it stands in.
        what: The key it stands under.
        kind: What is raised.
        budget: Steps that several patterns may take together.

    Raises:
        PlaitError: Whatever `kind` is: it takes too long.
    """
    budget = budget or Budget(_MOST_STEPS, SECONDS)
    try:
        try:
            if any("\n" in n for n in names):  # where "$" and "." mean more than the automaton knows
                raise Unsupported
            automaton = Automaton(pattern, budget)
            return [automaton.matches(n) for n in names]
        except Unsupported:
            return _by_child(pattern, names, budget)
    except TimeoutError:
        raise _slow(what, where, kind) from None


def _slow(what: str, where: str, kind: type[PlaitError]) -> PlaitError:
    return kind(f"{printable(what, 100)} could take forever to match", where=where, hint="name the modules plainly")


def _plain_hits(keys: Sequence[str], order: dict[str, int], names: Sequence[str], budget: Budget) -> dict[str, str]:
    """Keys without special characters but the dot, which stands for any character: the name's last characters, looked up."""
    shapes: dict[tuple[int, tuple[int, ...]], dict[str, str]] = {}
    for key in keys:
        dots = tuple(i for i, c in enumerate(key) if c == ".")
        shapes.setdefault((len(key), dots), {}).setdefault(key, key)
    hits: dict[str, str] = {}
    for name in names:
        budget.spend(5 * len(shapes))
        best: str | None = None
        for (length, dots), known in shapes.items():
            hit = known.get(_shaped(name, length, dots))
            if hit is not None and (best is None or order[hit] < order[best]):
                best = hit
        if best is not None:
            hits[name] = best
    return hits


def _shaped(name: str, length: int, dots: tuple[int, ...]) -> str:
    r"""The last characters of a name with dots where the key has its own; "\n" where the key cannot stand there."""
    start = len(name) - length
    if start < 0 or (start and name[start - 1] != "."):
        return "\n"
    tail = name[start:]
    if any(tail[i] == "\n" for i in dots):
        return "\n"
    pieces, done = [], 0
    for i in dots:
        pieces.append(tail[done:i])
        done = i + 1
    return ".".join([*pieces, tail[done:]])


def _by_child(pattern: str, names: Sequence[str], budget: Budget) -> list[bool]:
    if not names:
        return []
    started = time.monotonic()
    hits = by_engine(pattern, names, budget.seconds)
    budget.seconds -= time.monotonic() - started
    if budget.seconds <= 0:
        raise TimeoutError
    return hits


def by_engine(pattern: str, names: Iterable[str], seconds: float, *, whole: bool = False) -> list[bool]:
    """Whether each name matches by Python's own engine, which has no time limit, in a process, which has one.

    Args:
        pattern: A regex that compiles.
        names: What it is matched against.
        seconds: How long that may take.
        whole: Whether it has to match the whole name, not only its beginning.

    Raises:
        TimeoutError: It takes longer, or more memory than there is.
    """
    try:
        run = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", _CHILD.format(how="fullmatch" if whole else "match")],
            input=json.dumps([pattern, list(names)]),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    if run.returncode:
        raise TimeoutError
    return [bool(hit) for hit in json.loads(run.stdout)]
