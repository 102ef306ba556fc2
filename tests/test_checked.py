"""Records from elsewhere: every value of its type and in its range, or one error that names file and key."""

from __future__ import annotations

import json
import time

import pytest

from plait.border.checked import Record, distinct_keys, parsed_json, shown
from plait.errors import InputError, UsageError

WRONG = {
    "text for a number": (lambda r: r.integer("s"), "s is 'x', expected an integer from 0"),
    "true for a number": (lambda r: r.integer("yes"), "yes is True"),
    "2.0 for an integer": (lambda r: r.integer("two"), "two is 2.0"),
    "out of range": (lambda r: r.integer("n", 1, 2), "n is 3, expected an integer from 1 to 2"),
    "an integer beyond all floats": (lambda r: r.number("huge"), "huge is 1000.*, expected a finite number"),
    "infinity": (lambda r: r.number("inf"), "inf is inf, expected a finite number"),
    "NaN": (lambda r: r.number("nan"), "nan is nan"),
    "the excluded end": (lambda r: r.number("zero", 0.0, above=True), "zero is 0, expected a finite number above 0"),
    "null for a number": (lambda r: r.number("null", default=1.0), "null is None"),
    "absent": (lambda r: r.text("gone"), "gone is absent, expected a text"),
    "no choice": (lambda r: r.text("s", choices=("a", "b")), "expected one of a, b"),
    "long": (lambda r: r.text("s", longest=0), "at most 0 characters"),
    "half a surrogate pair": (lambda r: r.text("half"), "characters of text"),
    "half a pair in a list": (lambda r: r.texts("halves"), "a list of texts"),
    "text for true": (lambda r: r.flag("false"), "false is 'false', expected true or false"),
    "1 for true": (lambda r: r.flag("one", True), "one is 1"),
    "text for a list": (lambda r: r.texts("s", ()), "s is 'x', expected a list of texts"),
    "numbers in a list": (lambda r: r.texts("shape"), "a list of texts"),
    "a shape of three": (lambda r: r.integers("shape", length=2), "a list of 2 integers"),
    "a list for an object": (lambda r: r.record("shape"), "shape is .*, expected an object"),
    "inside": (lambda r: r.record("deep").integer("x"), "deep.x is 'y'"),
    "entries": (lambda r: list(r.record("mixed").records()), r"mixed\[b\] is 1, expected an object"),
    "unknown keys": (lambda r: r.only(["s"]), "unknown key"),
}


@pytest.fixture
def record() -> Record:
    values = {
        "s": "x", "yes": True, "two": 2.0, "n": 3, "huge": 10**400, "inf": float("inf"), "nan": float("nan"), "zero": 0,
        "null": None, "half": "\ud800", "halves": ["a", "\udfff"], "false": "false", "one": 1, "shape": [1, 2, 3],
        "deep": {"x": "y"}, "mixed": {"a": {}, "b": 1},
    }  # fmt: skip
    return Record.of(values, "some.json", hint="write it again")


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_names_file_key_expected_and_found(record, case):
    read, message = WRONG[case]
    with pytest.raises(InputError, match=message) as raised:
        read(record)
    assert raised.value.where == "some.json" and raised.value.exit_code == 3 and str(raised.value).isprintable()


def test_right_values_and_defaults(record):
    assert (record.integer("n"), record.integer("gone", default=7), record.number("zero"), record.flag("yes")) == (
        3,
        7,
        0.0,
        True,
    )
    assert record.flag("null", False) is False and record.flag("gone", True) is True
    assert record.texts("null", ["a"]) == ("a",) and record.integers("shape", length=3) == (1, 2, 3)
    assert record.record("null", optional=True).values == {} and not record.has("null") and record.has("zero")
    assert [k for k, _ in Record.of({"a": {}}, "f").records()] == ["a"]


def test_the_kind_of_error_is_the_callers(record):
    with pytest.raises(UsageError, match=r"recipe.n is 'x'"):
        Record.of({"n": "x"}, "r.yaml", inside="recipe", kind=UsageError).integer("n")
    for value in ([], "x", None, {1: 2}):
        with pytest.raises(InputError):
            Record.of(value, "f")


def test_what_cannot_be_shown_is_named():
    inside: list = []
    inside.append(inside)
    for value in (10**5000, inside, ["a" * 10**6] * 1000, {"k": [[[[[[[[1]]]]]]]]}):
        assert len(shown(value)) < 600


def test_json_of_metadata_is_bounded_and_its_keys_are_distinct():
    for text, message in (
        ("[" * 10**5, "not JSON"),
        ("x" * 101, "at most 100"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ("9" * 99, None),
    ):
        limit = 100 if message != "not JSON" else 10**6
        if message is None:
            assert parsed_json(text, "f", "it", limit)
            continue
        with pytest.raises(InputError, match=message):
            parsed_json(text, "f", "it", limit)


def test_distinct_keys_are_found_in_linear_time():
    pairs = [(f"k{i}", i) for i in range(300_000)]
    started = time.monotonic()
    with pytest.raises(ValueError, match="'k299999'"):
        distinct_keys([*pairs, pairs[-1]])
    assert time.monotonic() - started < 5 and json.loads("{}", object_pairs_hook=distinct_keys) == {}
