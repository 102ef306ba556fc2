"""When a written answer counts as the right one."""

from __future__ import annotations

import pytest

from plait.errors import UsageError
from plait.tasks import Source, Task
from plait.tasks.written import cut, pattern, same_answer


def task(**options) -> Task:
    return Task("t", "causal", Source("none"), ("text",), metrics=("exact_match",), **options)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("Paris\nQuestion: next", "\n", "Paris"),
        ("\n\n Paris \nmore", "\n", "Paris"),  # a model that begins with a line feed has not ended yet
        (" Paris\nmore ", None, "Paris\nmore"),
        ("", "\n", ""),
        ("yes###no", "###", "yes"),
    ],
)
def test_cut(text, stop, expected):
    assert cut(text, stop) == expected


@pytest.mark.parametrize(
    ("options", "written", "right", "same"),
    [
        ({}, "Paris", "Paris", True),
        ({}, "paris", "Paris", False),
        ({"compare": "case"}, "select  A from T", "SELECT a\nFROM t", True),
        ({"compare": "case"}, "the cat", "cat", False),
        ({"compare": "squad"}, "The cat.", "cat", True),
        ({"compare": "squad"}, "a theory", "theory", True),
        ({"compare": "squad"}, "theory", "ory", False),  # articles are words
        ({"compare": "number"}, "about 1,200 men", "1200.0", True),
        ({"compare": "number"}, "-3", "3", False),
        ({"compare": "number"}, "$.5", "0.50", True),
        ({"compare": "number"}, "\u22123", "-3", True),  # the minus of typesetting
        ({"compare": "number"}, "\u22123", "3", False),
        ({"compare": "number"}, "1.5e3 m", "1500", True),
        ({"compare": "number"}, "1e3", "1", False),
        ({"compare": "number"}, "2e", "2", True),
        ({"compare": "number"}, "none", "3", False),
        ({"compare": "number"}, "none", "nothing", False),  # no number in the right answer: no answer is right
        ({"extract": r"####\s*(\S+)", "compare": "number"}, "2 + 2 = 4\n#### 4", "so 1 + 3\n#### 4", True),
        ({"extract": r"####\s*(\S+)", "compare": "number"}, "4", "#### 4", False),
        ({"extract": r"####\s*(\S+)", "compare": "number"}, "#### 4\n\n#### 5", "#### 4", True),  # the first
        ({"extract": r"\d+"}, "so 12", "12 it is", True),
        ({"extract": r"(a)|b"}, "b", "b", False),  # a group without a match says nothing
        ({"stop": "\n"}, "yes\nno", "yes", True),
        ({"stop": "\n", "compare": "case"}, "\nYES\nno", "yes", True),
    ],
)
def test_same_answer(options, written, right, same):
    assert same_answer(written, right, task(**options)) is same


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(UsageError, match="no regular expression"):
        pattern("(", "t")
    with pytest.raises(UsageError, match="expected one of exact, case, squad, number"):
        task(compare="fuzzy")
    with pytest.raises(UsageError, match="empty stop"):
        task(stop="")
    with pytest.raises(UsageError, match="answers to choose from"):
        task(stop="\n", labels=("yes", "no"))
    with pytest.raises(UsageError, match="that are written"):
        Task("t", "classification", Source("none"), ("text",), compare="case")
