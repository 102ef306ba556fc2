"""A regular expression as an automaton that reads each character once: the same answers as `re.match`, in linear time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

_parser: Any = getattr(re, "_parser", None)
_MOST_NODES = 4000
_FOREVER = _parser.MAXREPEAT if _parser else None
Test = Callable[[str], bool]


class Unsupported(Exception):  # noqa: N818 (no fault: another way is taken)
    """The pattern holds something that no automaton of this kind expresses."""


class Budget:
    """Work that may be done, over several patterns: steps of automata, seconds of child processes."""

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.seconds = steps, seconds

    def spend(self, steps: int) -> None:
        """Count work.

        Raises:
            TimeoutError: All that was allowed is done.
        """
        self.steps -= steps
        if self.steps < 0:
            raise TimeoutError


class Automaton:
    """Thompson's construction over the tree that Python's own parser makes; states are joined into sets as they are met.

    Whether a match is greedy does not matter: what is asked is only whether there is one.

    Args:
        pattern: A regex that compiles.
        budget: Work allowed, in characters and nodes looked at.

    Raises:
        Unsupported: Lookarounds, references, word boundaries, flags, repeats of what may be empty, or over
            `_MOST_NODES` nodes.
    """

    def __init__(self, pattern: str, budget: Budget) -> None:
        if _parser is None:
            raise Unsupported
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = _parser.parse(pattern)
        if tree.state.flags & ~re.UNICODE.value:
            raise Unsupported
        self._tests: list[Test | None] = [None]  # per node: what the next character must be; None for no character
        self._next: list[list[int]] = [[]]
        self._marks: list[str] = ["accept"]  # "", "accept", "begin" or "end"
        self._budget = budget
        start = self._sequence(tree, 0)
        self._first = self._closed([start], begin=True)
        self._moves: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._ends: dict[frozenset[int], bool] = {}

    def matches(self, name: str) -> bool:
        """Whether the pattern matches at the beginning of a name without newlines.

        Raises:
            TimeoutError: The allowed work is done.
        """
        states = self._first
        if not name:
            return self._accepts(self._closed(states, begin=True, end=True))
        for c in name:
            if 0 in states:
                return True
            self._budget.spend(1)
            move = (states, c)
            if move not in self._moves:
                hit = [n for s in states if (test := self._tests[s]) and test(c) for n in self._next[s]]
                self._moves[move] = self._closed(hit)
            states = self._moves[move]
            if not states:
                return False
        if states not in self._ends:
            self._ends[states] = self._accepts(self._closed(states, end=True))
        return self._ends[states]

    def _accepts(self, states: frozenset[int]) -> bool:
        return 0 in states

    def _closed(self, states: Iterable[int], *, begin: bool = False, end: bool = False) -> frozenset[int]:
        """Add to states all that is reached from them without reading a character."""
        reached: set[int] = set()
        stack = list(states)
        while stack:
            state = stack.pop()
            if state in reached:
                continue
            reached.add(state)
            mark = self._marks[state]
            if self._tests[state] is None and (mark == "" or (mark == "begin" and begin) or (mark == "end" and end)):
                stack.extend(self._next[state])
        self._budget.spend(len(reached))
        return frozenset(reached)

    # --- building, from the end backwards: every part is given the node that follows it -------------------------------

    def _node(self, following: list[int], test: Test | None = None, mark: str = "") -> int:
        if len(self._tests) >= _MOST_NODES:
            raise Unsupported
        self._budget.spend(1)
        self._tests.append(test)
        self._next.append(following)
        self._marks.append(mark)
        return len(self._tests) - 1

    def _sequence(self, parts: Any, after: int) -> int:
        for op, value in reversed(list(parts)):
            after = self._part(str(op), value, after)
        return after

    def _part(self, op: str, value: Any, after: int) -> int:
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return self._node([after], _test(op, value))
        if op == "BRANCH":
            return self._node([self._sequence(branch, after) for branch in value[1]])
        if op == "SUBPATTERN":
            _, added, removed, inner = value
            if added or removed:
                raise Unsupported
            return self._sequence(inner, after)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, inner = value
            return self._repeat(low, high, inner, after)
        if op == "AT":
            mark = {"AT_BEGINNING": "begin", "AT_BEGINNING_STRING": "begin", "AT_END": "end", "AT_END_STRING": "end"}
            if str(value) in mark:
                return self._node([after], mark=mark[str(value)])
        raise Unsupported

    def _repeat(self, low: int, high: int, inner: Any, after: int) -> int:
        if high > 1 and inner.getwidth()[0] == 0:
            raise Unsupported
        if high == _FOREVER:
            loop = self._node([after])
            self._next[loop].append(self._sequence(inner, loop))
            after = loop
        elif high - low > _MOST_NODES:
            raise Unsupported
        else:
            last = after
            for _ in range(high - low):
                after = self._node([last, self._sequence(inner, after)])
        if low > _MOST_NODES:
            raise Unsupported
        for _ in range(low):
            after = self._sequence(inner, after)
        return after


def _test(op: str, value: Any) -> Test:
    """What a character must be."""
    if op == "ANY":
        return lambda c: c != "\n"
    if op == "LITERAL":
        return lambda c: ord(c) == value
    if op == "NOT_LITERAL":
        return lambda c: ord(c) != value
    negated = bool(value) and str(value[0][0]) == "NEGATE"
    items = [_item(str(kind), inner) for kind, inner in value[negated:]]
    return lambda c: any(item(c) for item in items) != negated


def _item(kind: str, value: Any) -> Test:
    if kind == "LITERAL":
        return lambda c: ord(c) == value
    if kind == "RANGE":
        return lambda c: value[0] <= ord(c) <= value[1]
    if kind == "CATEGORY":
        name = str(value).removeprefix("CATEGORY_")
        known: dict[str, Test] = {
            "DIGIT": str.isdecimal,
            "SPACE": str.isspace,
            "WORD": lambda c: c.isalnum() or c == "_",
        }
        test = known.get(name.removeprefix("NOT_"))
        if test is not None:
            return (lambda c: not test(c)) if name.startswith("NOT_") else test
    raise Unsupported
