"""Texts: read from lines and tables, all kinds of a sorted file among them, faults named by their place."""

from __future__ import annotations

import json

import pytest

from plait.errors import InputError, UsageError
from plait.fidelity.texts import LIMIT, parse_texts, read_place, spread_over


def test_texts_are_read_from_lines_and_tables(tmp_path):
    lines = tmp_path / "a.txt"
    lines.write_text("one\n\n two three \n", "utf-8")
    assert read_place(str(lines)) == (("one",), (" two three ",))
    lines.write_text("a\tb\nc\td\n")
    assert read_place(str(lines), 1) == (("a", "b"),)
    table = tmp_path / "b.jsonl"
    table.write_text('{"premise": "x", "hypothesis": "y", "text": "z"}\n')
    assert read_place(str(table)) == (("z",),)
    assert parse_texts([f"t={table}:premise,hypothesis"]) == {"t": (("x", "y"),)}
    (tmp_path / "c.csv").write_text("q\n1\n")
    for place, message in (
        ("c.csv", "no column 'text'"),
        ("b.jsonl:nope", "no column 'nope'"),
        ("none.txt", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            parse_texts([f"t={tmp_path / place}"])
    lines.write_text("a\tb\nc\n")
    with pytest.raises(InputError, match="has 1 part, the first has 2"):
        read_place(str(lines))
    (tmp_path / "pairs.csv").write_text("a,b\nx,y\nz,\n")
    with pytest.raises(
        InputError, match=r"row 1 is empty or no text in its second part \(pairs and single texts go into"
    ):
        parse_texts([f"t={tmp_path / 'pairs.csv'}:a,b"])
    (tmp_path / "blank.csv").write_text('sentence\nx\n""\ny\n')
    with pytest.raises(InputError) as raised:
        parse_texts([f"t={tmp_path / 'blank.csv'}"])
    assert str(raised.value).endswith("row 1 is empty or no text (leave that row out; the first is row 0)")
    lines.write_text("\n")
    with pytest.raises(InputError, match="no texts"):
        read_place(str(lines))
    lines.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="UTF-8"):
        read_place(str(lines))
    for wrong in ("t", "=x", "t="):
        with pytest.raises(UsageError, match="TASK=FILE"):
            parse_texts([wrong])
    lines.write_text("a\n")
    with pytest.raises(UsageError, match="twice"):
        parse_texts([f"t={lines}", f"t={lines}"])


def test_texts_of_a_sorted_file_are_of_all_its_kinds(tmp_path):
    """A file that is sorted by label: what is read has both in the same share as the file, and so has every beginning of it."""
    rows = [f"bad {i}" for i in range(600)] + [f"good {i}" for i in range(200)]
    (tmp_path / "sorted.txt").write_text("\n".join(rows) + "\n")
    table = "".join(json.dumps({"text": r}) + "\n" for r in rows)
    (tmp_path / "sorted.jsonl").write_text(table)
    of_lines, of_table = (parse_texts([f"t={tmp_path / f'sorted.{kind}'}"])["t"] for kind in ("txt", "jsonl"))
    assert of_lines == of_table and len(set(of_lines)) == LIMIT and {r for (r,) in of_lines} <= set(rows)
    for n in (16, 32, 64, 100):
        assert sum(r.startswith("good") for (r,) in of_lines[:n]) == pytest.approx(n / 4, abs=2)
    few = rows[560:640]  # fewer than are read: half of each kind, and so are the sixteen that a choice begins with
    (tmp_path / "few.txt").write_text("\n".join(few))
    of_few = parse_texts([f"t={tmp_path / 'few.txt'}"])["t"]
    assert sorted(of_few) == sorted((r,) for r in few) and 6 <= sum(r.startswith("good") for (r,) in of_few[:16]) <= 10
    assert read_place(str(tmp_path / "sorted.txt"), 3) == (
        ("bad 0",),
        ("bad 1",),
        ("bad 2",),
    )  # prompts that are shown stay in order


def test_a_row_that_is_no_text_is_named_by_its_place_in_the_file(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(300)]
    chosen = spread_over(300, LIMIT)[7]
    rows[chosen]["text"] = " "
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(InputError, match=f"row {chosen} is empty"):
        parse_texts([f"t={tmp_path / 'rows.jsonl'}"])


def test_a_line_ends_at_its_end_alone(tmp_path):
    file = tmp_path / "a.txt"
    whole = ["one\u2028still one", "two\x0cstill two", "three\x85still three"]
    file.write_bytes("\r\n".join(whole).encode())
    assert read_place(str(file)) == tuple((line,) for line in whole)
