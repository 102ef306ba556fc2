"""The sampler of mutants: faults where they matter, none in what is only said, and outcomes that add up."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from benchmarks.trust.mutants import ROOMS, Outcome, Reach, drawn, rows
from benchmarks.trust.mutations import mutants

PACKAGE = Path(__file__).parents[1] / "src/plait"
SOURCE = '''
"""Text with 1 number."""
if TYPE_CHECKING:
    LIMIT = 4
LIMIT: int = 5


def f(x: int, é: float = 0.5) -> int:
    """Say 3."""
    if x < LIMIT and not x:
        raise ValueError(f"below {1 + 2}")
    x += 1
    g(x)
    return x - é if x in (1, 2) else "a" + "b"
'''


def test_each_kind_of_fault_and_none_in_texts_types_and_messages():
    found = [m.text for m in mutants(SOURCE)]
    assert sorted(found) == sorted(
        [
            "constant: 5 -> (5 + 1)",
            "constant: 0.5 -> (0.5 + 1)",
            "boolean: x < LIMIT and not x -> ((x < LIMIT) or (not x))",
            "condition: x < LIMIT and not x -> False",
            "condition: x < LIMIT and not x -> True",
            "comparison: x < LIMIT -> ((x) <= (LIMIT))",
            "comparison: x < LIMIT -> ((x) >= (LIMIT))",
            "boolean: not x -> bool(x)",
            'removed: raise ValueError(f"below {1 + 2}") -> pass',
            "removed: x += 1 -> pass",
            "constant: 1 -> (1 + 1)",
            "removed: g(x) -> pass",
            "arithmetic: x - é -> ((x) + (é))",
            'return: x - é if x in (1, 2) else "a" + "b" -> None',
            "comparison: x in (1, 2) -> ((x) not in ((1, 2)))",
            "condition: x in (1, 2) -> (not (x in (1, 2)))",
            "constant: 1 -> (1 + 1)",
            "constant: 2 -> (2 + 1)",
        ]
    )


def test_a_mutant_is_the_file_with_one_change():
    for mutant in mutants(SOURCE):
        changed = mutant.applied(SOURCE)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))
        differing = [
            i for i, (a, b) in enumerate(zip(SOURCE.split("\n"), changed.split("\n"), strict=False), 1) if a != b
        ]
        assert differing == [mutant.line] and mutant.line in mutant.lines


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_are_there_and_a_sample_is_the_same_again(room):
    for pattern in ROOMS[room]:
        assert list(PACKAGE.glob(pattern)), pattern
    one, again = (drawn(PACKAGE, [room], 12, 3) for _ in range(2))
    assert one == again != drawn(PACKAGE, [room], 12, 4) and len(set(one)) == 12
    for _, file, mutant in one:
        ast.parse(mutant.applied((PACKAGE / file).read_text(encoding="utf-8")))


def test_every_room_has_its_share():
    found = [room for room, _, _ in drawn(PACKAGE, list(ROOMS), 5 * len(ROOMS), 0)]
    assert {found.count(room) for room in ROOMS} == {5}


def test_a_file_is_a_room_of_its_own():
    found = drawn(PACKAGE, ["runs/single/pooled.py", "merging/light/exponents.py"], 8, 0)
    assert [(room, file) for room, file, _ in found] == [
        (f, f) for f in ("runs/single/pooled.py", "merging/light/exponents.py")
    ] * 4


def test_tests_that_reach_the_line_and_those_beside_them():
    lines = {"a.py": {1: ["t/x.py::one", "t/x.py::slow", "t/x.py::broken"], 2: ["t/x.py::one"], 3: []}}
    reach = Reach(lines, {"t/x.py::one": 0.2, "t/x.py::slow": 9.0, "t/x.py::far": 0.1, "t/y.py::z": 0.1})
    assert reach.tests("a.py", (1, 2)) == ["t/x.py::one", "t/x.py::slow"] and reach.tests("a.py", (3,)) == []
    assert reach.beside("a.py") == ["t/x.py::far", "t/x.py::one", "t/x.py::slow"] and reach.beside("b.py") == []


def test_outcomes_are_counted_and_a_timeout_neither_way():
    kinds = ["killed", "killed", "survived", "timed out", "not reached"]
    found = [Outcome("study", "a.py", i, "m", kind, 1, 0.1) for i, kind in enumerate(kinds)]
    (row,) = rows(found)
    assert (row.tried, row.held, row.fell) == (4, 2, 2)
    assert row.notes[0] == "survived: a.py:2: m" and row.notes[2].startswith("timed out, counted neither way: a.py:3")
