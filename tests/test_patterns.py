"""Patterns of strangers: what Python's engine answers, in bounded time."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.border.automaton import Automaton, Budget, Unsupported
from plait.border.patterns import first_hits, matches, require_patterns
from plait.errors import InputError, UsageError

ATOMS = [
    "a",
    "b",
    "q",
    "_",
    ".",
    "a.b",
    r"\.",
    r"\d",
    r"\D",
    r"\w",
    r"\W",
    r"\s",
    "[a-c]",
    "[^b]",
    "[^.]",
    "[.1]",
    ".*",
    "q_proj",
    "1",
    "é",
    "",
]
REPEATS = ["*", "+", "?", "*?", "+?", "??", "{1,2}", "{2}", "{0,3}", "{2,}"]
NAMES = st.lists(st.text(alphabet="abq_.1é ", max_size=9), min_size=1, max_size=6, unique=True)


def combined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
        st.tuples(inner, st.sampled_from(REPEATS)).map(lambda p: f"({p[0]}){p[1]}"),
        st.tuples(inner, st.sampled_from(["$", "^", "|", r"\Z", r"\A", r"\b"]), inner).map("".join),
        inner.map(lambda p: f"(?={p})"),
        inner.map(lambda p: f"(?P<x>{p})(?P=x)"),
    )  # fmt: skip


PATTERNS = st.recursive(st.sampled_from(ATOMS), combined, max_leaves=6)


def by_re(keys, names):
    found = {}
    for name in names:
        hit = next((k for k in keys if re.match(rf"(.*\.)?({k})$", name)), None)
        found |= {} if hit is None else {name: hit}
    return found


@given(st.lists(PATTERNS, min_size=1, max_size=3, unique=True), NAMES)
def test_first_hits_are_those_of_re(keys, names):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            [re.compile(rf"(.*\.)?({k})$") for k in keys]
            expected = by_re(keys, names)
    except re.error:
        with pytest.raises(InputError, match="not a regex"):
            first_hits(keys, names, where="f", what="rank_pattern")
        return
    assert first_hits(keys, names, where="f", what="rank_pattern") == expected


@settings(max_examples=20)
@given(
    st.lists(PATTERNS, min_size=1, max_size=2, unique=True), st.lists(st.text(alphabet="a.\n", max_size=4), min_size=1)
)
def test_names_with_newlines_too(keys, names):
    test_first_hits_are_those_of_re.hypothesis.inner_test(keys, names)


@given(PATTERNS, NAMES)
def test_the_automaton_alone_answers_as_re(pattern, names):
    try:
        automaton = Automaton(pattern, Budget(10**6, 1.0))
    except (re.error, Unsupported):
        return
    for name in (n for n in names if "\n" not in n):
        assert automaton.matches(name) == bool(re.match(pattern, name)), (pattern, name)


@given(st.lists(st.text(alphabet="ab.", max_size=4), min_size=1, unique=True), NAMES)
def test_plain_names_are_looked_up_with_the_dot_as_any_character(keys, names):
    assert first_hits(keys, names, where="f", what="rank_pattern") == by_re(keys, names)


SLOW = [
    ".*.*.*.*zz",
    ".+.+.+.+zz",
    "([a-z.]+)+x",
    "(a|a)*b" * 4,
    "(a|aa)+$b",
    "a?" * 60 + "a" * 60 + "x",
    "(.*)*x",
    ".*" * 200 + "x",
]


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("length", [60, 400, 4000])
def test_endless_patterns_end(pattern, length):
    started = time.monotonic()
    try:
        assert first_hits([pattern], ["a" * length], where="f", what="rank_pattern") == {}
    except InputError as e:  # a repeat of what may be empty is left to the child process
        assert "take forever" in str(e) and pattern == "(.*)*x"
    assert time.monotonic() - started < 8


def test_what_only_backtracking_can_match_has_a_time_limit():
    started = time.monotonic()
    with pytest.raises(UsageError, match="take forever"):
        matches(r"(?=a)(a|a)*\1b", ["a" * 64], where="f", what="target_modules", kind=UsageError)
    assert 4 < time.monotonic() - started < 9
    assert matches(r"(?!.*vision).*q_proj", ["x.q_proj", "vision.q_proj"], where="f", what="x") == [True, False]


def test_ten_thousand_modules_with_a_rank_each():
    names = [f"model.layers.{i}.mlp.experts.{j}.down_proj" for i in range(100) for j in range(100)]
    started = time.monotonic()
    assert len(first_hits([n.removeprefix("model.") for n in names], names, where="f", what="rank_pattern")) == len(
        names
    )
    assert time.monotonic() - started < 10


def test_many_keys_on_many_names_are_bounded():
    names = [f"layers.{i}.q_proj" for i in range(1000)]
    started = time.monotonic()
    for keys in (
        [f"a*{i}" for i in range(20_000)],
        [("x." * (i % 99)).ljust(i) + "y" for i in range(1, 2000)] * 2,
    ):
        with pytest.raises(InputError, match=r"take forever|over 50000 characters"):
            first_hits(keys, [*names, *("." * 60 + n for n in names)], where="f", what="rank_pattern")
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("pattern", "passes"),
    [
        (r"^(?:.*\.)?layers\.(?:[0-1])\.(?:self_attn|cross_attn)\.(?:q_proj|v_proj)", True),
        (r"(?:.*\.)?(query|key)$", True), ("a)(b", True), ("[[]", True), ("", True),
        ("(?i)q", False), ("que(ry", False), ("*", False), ("(" * 1500, False), ("a" * 2001, False), (r"\Q", False),
    ],
)  # fmt: skip
def test_patterns_that_are_taken_and_refused(pattern, passes):
    if passes:
        require_patterns([pattern], "f", "rank_pattern")
    else:
        with pytest.raises(InputError, match="rank_pattern") as raised:
            require_patterns([pattern], "f", "rank_pattern")
        assert raised.value.exit_code == 3 and len(str(raised.value)) < 400
