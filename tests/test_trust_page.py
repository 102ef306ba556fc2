"""The page of attacks: rows that add up, every finding with what holds it, and parts of several runs in one file."""

from __future__ import annotations

import json

import pytest
from benchmarks.trust import Row, gathered, row, source, undisturbed, write_part
from benchmarks.trust.findings import FINDINGS, cases_of, table
from benchmarks.trust.page import page
from benchmarks.trust.page import write as page_of
from benchmarks.trust.reached import FILES, PACKAGE, reached, reading_lines
from benchmarks.trust.small import comparable, differing, litter

from plait.disk import durable
from plait.runs import journal
from plait.runs.journal import JOURNAL, about_runs, noted


def test_rows_add_up():
    assert row("x", ["", "broke", ""]) == Row("x", 3, 2, 1, ("broke",))
    with pytest.raises(ValueError, match="3 tried"):
        Row("x", 3, 3, 1)


def test_every_finding_is_there_and_is_held_by_something_that_exists():
    numbers = [f"{k}{i}" for k, n in (("S", 10), ("D", 2), ("H", 4), ("U", 15)) for i in range(1, n + 1)]
    assert [f.number for f in FINDINGS] == numbers
    lines = table()  # raises where a test that is named is not there
    assert len(lines) == len(numbers) + 2 and not [line for line in lines if "no test of its own" in line]
    assert any("use_rslora" in case for case in cases_of("S8")) and len(cases_of("U8")) > len(cases_of("U7"))


def test_the_page_tells_every_row_and_what_fell(tmp_path):
    write_part(tmp_path, "kills", [row("plait merge: killed", ["", "after 1 s: litter"])], "make it")
    write_part(tmp_path, "power", [row("plait stats: power", [""])])
    found = gathered(tmp_path)
    assert json.loads(json.dumps(found))["rows"][0]["fell"] == 1
    text = page(found, ["A remark."])
    assert (
        f"| plait merge: killed | 2 | 1 | 1 | {source()[:8]} |" in text
        and "after 1 s: litter" in text
        and "A remark." in text
    )
    assert "    make it" in text and "| S1 |" in text


def test_pieces_of_one_source_add_up(tmp_path):
    for i, fell in enumerate(("", "litter")):
        write_part(tmp_path / str(i), "kills", [row("merge", ["", fell], ["a note"])], f"seed {i}", {"mutants": [i]})
    (part,) = gathered(tmp_path)["parts"]
    assert part["mutants"] == [0, 1]
    assert gathered(tmp_path)["rows"] == [
        {
            "part": "kills",
            "source": source(),
            "what": "merge",
            "tried": 4,
            "held": 3,
            "fell": 1,
            "notes": ("a note", "litter"),
        }
    ]
    assert part["command"] == "seed 0; seed 1"
    file = tmp_path / "1" / "kills.json"
    file.write_text(file.read_text().replace('"source": "', '"source": "0'))
    with pytest.raises(ValueError, match="different sources"):
        gathered(tmp_path)


def test_rows_of_an_earlier_page_stay_where_nothing_as_large_was_tried_again(tmp_path):
    attacks = {"old": ([row("merge", [""] * 2), row("stats", [""] * 9), row("init", ["x"])], "first"),
               "new": ([row("merge", [""] * 3), row("stats", [""] * 4)], "second")}  # fmt: skip
    for name, (rows, command) in attacks.items():
        write_part(tmp_path / name, "kills", rows, command, {"mutants": [name]})
    write_part(tmp_path / "old", "power", [row("run", [""])], "third")
    file = tmp_path / "old" / "kills.json"
    file.write_text(file.read_text().replace(source(), "0" * 16))
    page_of(tmp_path / "old", tmp_path / "page")
    both = gathered(tmp_path / "new", tmp_path / "page.json")
    assert [(r["part"], r["what"], r["tried"], r["source"][:4]) for r in both["rows"]] == [
        ("kills", "stats", 9, "0000"), ("kills", "init", 1, "0000"), ("kills", "merge", 3, source()[:4]),
        ("kills", "stats", 4, source()[:4]), ("power", "run", 1, source()[:4]),
    ]  # fmt: skip
    kills, power = both["parts"]
    assert (kills["command"], kills["mutants"], power["command"]) == ("first; second", ["old", "new"], "third")


def test_recorded_times_are_no_other_bytes_and_numbers_are():
    one = {"a.json": b'{"seconds": 1, "x": 2}', "b.jsonl": b'{"x": 1, "wall_seconds": 2}\n'}
    later = {"a.json": b'{"x": 2, "seconds": 5}', "b.jsonl": b'{"wall_seconds": 3, "x": 1}\n'}
    assert comparable(one) == comparable(later) and not differing(one, later)
    assert differing(one, {**later, "a.json": b'{"x": 3}'}) == {"a.json"}
    assert comparable({"w": b"1"}) != comparable({"w": b"2"})


def test_litter_is_found(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.gitkeep").touch()
    assert not litter(tmp_path)
    (tmp_path / ".out.staging").mkdir()
    (tmp_path / "out/.x.lock").touch()
    assert litter(tmp_path) == [".out.staging", "out/.x.lock"]


def test_the_folder_of_a_run_is_on_the_disk_before_what_is_in_it(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(durable, "flush_folder", flushed.append)
    monkeypatch.setattr(journal, "flush_folder", flushed.append)
    with noted(tmp_path / "runs" / "one", "cpu", "InProcess", 1, 1):
        assert set(flushed) == {tmp_path, tmp_path / "runs"}
    assert flushed[-1] == tmp_path / "runs" / "one"  # whose journal is new
    flushed.clear()
    with noted(tmp_path / "runs" / "one", "cpu", "InProcess", 1, 1):
        assert not flushed


@pytest.mark.parametrize("line", [b'{"seconds": 1', b"\xff\x00", b"{}", b"[]", b"5"])
def test_lines_of_the_journal_that_are_none_are_counted(tmp_path, line):
    with noted(tmp_path, "cpu", "Processes", 1, 3):
        pass
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(line + b"\n")
    assert "cannot be read" in about_runs(tmp_path)["seconds"]
    (tmp_path / JOURNAL).write_bytes(line)
    assert about_runs(tmp_path) == {"seconds": f"unknown: 1 line of {JOURNAL} cannot be read"}


def test_what_the_fuzzer_reaches_is_counted_in_functions_that_read():
    parts = [
        "X = 1",
        "def read(x):",
        "    if x:",
        "        return 1",
        "class A:",
        "    def see(self):",
        "        return 2",
    ]
    source = "\n".join([*parts, "    def write(self):", "        return 3"])
    assert reading_lines(source) == {3, 4, 7}
    assert all((PACKAGE / file).is_file() for files in FILES.values() for file in files)


@pytest.mark.slow
def test_a_little_fuzzing_reaches_most_of_a_reader():
    found = reached("mergekit recipes", 200, 0)
    assert found.held > 0.8 * found.tried and (found.fell == 0) == ("not reached: none" in found.notes[0])


def test_a_command_that_fails_undisturbed_is_a_row_that_fell():
    def attack():
        raise RuntimeError("plait run: exit code 1")

    found = undisturbed("run", attack, lambda r: r)
    assert (found.tried, found.fell, found.notes) == (1, 1, ("plait run: exit code 1",))
    assert undisturbed("run", lambda: 5, lambda r: r) == 5
