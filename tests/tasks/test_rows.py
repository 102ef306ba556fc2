"""Rows from files people really have: odd encodings, holes, labels that disagree; each named, none guessed."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from plait.errors import InputError, PlaitError, UsageError
from plait.tasks import Examples, Source, Task, load_examples, load_task
from plait.tasks.rows import skipped_rows
from plait.tasks.task import require_same_classes
from tests.conftest import tiny_rows, write_rows

GOOD = b"text,label\n" + b"a b,0\nc d,1\n" * 5


def task(name: str, validation: str | None = None, **changed) -> Task:
    return Task(
        "t", changed.pop("kind", "classification"), Source(name, validation), changed.pop("text", ("text",)), **changed
    )


def load(folder: Path, name: str, data: bytes | pa.Table, **changed) -> tuple[Task, Examples]:
    if isinstance(data, bytes):
        (folder / name).write_bytes(data)
    else:
        parquet.write_table(data, folder / name)
    known = load_task(task(name, **changed), root=folder)
    return known, load_examples(known, "train", root=folder)


def jsonl(*rows: dict) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows * 5).encode()


# --- what is read -----------------------------------------------------------------------------------------------------

READ = {
    "plain.csv": (GOOD, ("0", "1")),
    "crlf-bom.csv": (b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n"), ("0", "1")),
    "tabs.tsv": (GOOD.replace(b",", b"\t"), ("0", "1")),
    "names.csv": (GOOD.replace(b",0", b",no").replace(b",1", b",yes"), ("no", "yes")),
    "truth.csv": (GOOD.replace(b",0", b",false").replace(b",1", b",true"), ("False", "True")),
    "truth.jsonl": (jsonl({"text": "a", "label": False}, {"text": "b", "label": True}), ("False", "True")),
    "bom.jsonl": (b"\xef\xbb\xbf" + jsonl({"text": "é", "label": 0}, {"text": "b", "label": 1}), ("0", "1")),
    "dictionary.parquet": (
        pa.table(
            {
                "text": pa.array(["a", "b"] * 5).dictionary_encode(),
                "label": pa.array(["x", "y"] * 5).dictionary_encode(),
            }
        ),
        ("x", "y"),
    ),
    "numbers that are text.csv": (GOOD.replace(b"a b", b"7"), ("0", "1")),
}


@pytest.mark.parametrize("name", READ)
def test_files_that_are_read(tmp_path, name):
    data, labels = READ[name]
    known, rows = load(tmp_path, name, data)
    assert known.labels == labels and list(rows.labels[:4]) == [0, 1, 0, 1]
    held = load_examples(known, "validation", root=tmp_path)
    assert len(rows) == 8 and len(held) == 2 and not set(rows.ids) & set(held.ids)  # every fifth row is held out


def test_a_row_of_ten_megabytes_and_quoted_lines(tmp_path):
    known, rows = load(tmp_path, "a.csv", b"text,label\n" + b"x " * 5_000_000 + b",0\n" + b'"a\nb ""c""",1\n' * 9)
    assert len(rows.texts[0][0]) == 10_000_000 and rows.texts[1] == ('a\nb "c"',) and known.num_labels == 2


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_kinds_of_file_agree(tmp_path, suffix):
    rows = tiny_rows(3, 20, pair=True)
    write_rows(tmp_path / f"a.{suffix}", rows)
    known = load_task(task(f"a.{suffix}", f"a.{suffix}", text=("text", "other")), root=tmp_path)
    found = load_examples(known, "train", root=tmp_path)
    assert found.texts == tuple((r["text"], r["other"]) for r in rows)
    assert list(found.labels) == [r["label"] for r in rows]
    few = load_examples(known, "train", root=tmp_path, rows=7, seed=3)
    again = load_examples(known, "train", root=tmp_path, rows=7, seed=3)
    assert list(few.ids) == list(again.ids) == sorted(few.ids) and len(few) == 7
    assert few.texts == tuple(found.texts[i] for i in few.ids)


def test_regression_knows_its_mean(tmp_path):
    table = pa.table({"text": ["a"] * 10, "label": [Decimal(i) for i in range(10)]})
    known, rows = load(tmp_path, "a.parquet", table, kind="regression")
    assert (
        known.num_labels == 1
        and rows.labels.dtype == np.float32
        and known.target_mean == pytest.approx(np.mean(rows.labels))
    )


@pytest.mark.parametrize(
    ("cells", "labels", "answers"),
    [
        ((7, 12, 3, 100), None, ("7", "12", "3", "100")),  # no numbers of answers: of 12 there would be none
        ((0, 1, 2, 10), None, ("0", "1", "2", "10")),  # sorted as text, "10" is the third of them
        (("true", "true"), None, ("true", "true")),
        (
            ("72", "3.50", "007", "1e3"),
            None,
            ("72", "3.50", "007", "1e3"),
        ),  # as they are spelled, whatever stands beside them
        ((72, 4), None, ("72", "4")),
        (("true", "false"), ("no", "yes"), ("yes", "no")),
        ((1, 2), ("1", "2", "many"), ("1", "2")),
        (("007", "1"), ("1", "7"), ("7", "1")),
        ((1, 0), ("no", "yes"), ("yes", "no")),
        ((1, 5), ("1", "2", "3", "4", "5"), ("1", "5")),
    ],
)
def test_numbers_that_are_to_be_written(tmp_path, cells, labels, answers):
    rows = ("text,label\n" + "".join(f"how many,{c}\n" for c in cells)).encode()
    assert load(tmp_path, "t.csv", rows, kind="causal", labels=labels)[1].labels == answers


@pytest.mark.parametrize("labels", [("no", "yes"), ("1", "3")])
def test_a_number_of_no_answer(tmp_path, labels):
    with pytest.raises(InputError, match="answer 2 in row 1 is not one of the 2 answers"):
        load(tmp_path, "t.csv", b"text,label\na,1\nb,2\n", kind="causal", labels=labels)


def test_a_template_makes_the_prompt(tmp_path):
    data = b"q,label\nwho {label}?,a\nwhat?,b\n" + b"x,c\n" * 3
    _known, rows = load(tmp_path, "a.csv", data, kind="causal", text=("q",), template="Q: {q} A:")
    assert rows.texts[0] == ("Q: who {label}? A:",) and list(rows.labels[:2]) == ["a", "b"]


def test_what_a_text_says_in_braces_is_no_field(tmp_path):
    data = b"code,out,label\nprint(f'{out}{code}'),42,yes\n" + b"x,y,no\n" * 4
    kinds = {"kind": "causal", "text": ("code", "out"), "template": "{code} gives {out}."}
    _known, rows = load(tmp_path, "a.csv", data, **kinds)
    assert rows.texts[0] == ("print(f'{out}{code}') gives 42.",)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "causal", "label_column": "text"}, "column 'text' is asked for twice"),
        ({"kind": "causal", "template": "Q: {txt} A:"}, "the template has no {text}"),
        ({"kind": "classification", "template": "Q: {text} A:"}, "a template is of prompts, this is a classification"),
    ],
)
def test_a_template_that_nothing_is_put_into_is_refused(tmp_path, changed, message):
    with pytest.raises(UsageError, match=message):
        load(tmp_path, "a.csv", b"text,label\na,x\nb,y\n", **changed)


@pytest.mark.parametrize(
    ("data", "changed", "message"),
    [
        (b'text,label\na,"x\ny"\nb,"u\nv"\n', {"stop": "\n"}, "'x.ny' holds the stop string"),
        (b"text,label\na,x\nb,y\n", {"compare": "number"}, "'x' has nothing that `extract` and `compare` look for"),
        (b'text,label\na,x\nb,"u\nv"\n', {"stop": "\n"}, None),  # one may be right
        (b'text,label\na,"#### 4\nfor"\n', {"stop": "\n", "extract": "#### (.*)"}, None),
    ],
)
def test_right_answers_none_of_which_would_count_are_refused(tmp_path, data, changed, message):
    (tmp_path / "a.csv").write_bytes(data)
    about = Task("t", "causal", Source("a.csv", "a.csv"), ("text",), metrics=("exact_match",), **changed)
    if message is None:
        assert len(load_examples(about, "validation", root=tmp_path))
        return
    with pytest.raises(InputError, match=message):
        load_examples(about, "validation", root=tmp_path)


# --- what is refused: items 38 to 40 ----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[bytes | pa.Table, str]] = {
    "empty.csv": (b"", "Empty CSV file"),
    "header.csv": (b"text,label\n", "no rows"),
    "empty.jsonl": (b"", "cannot be read|no rows"),
    "one class.csv": (b"text,label\na,1\nb,1\n", "only one class"),
    "missing column.csv": (GOOD.replace(b"text", b"txt"), "no column 'text'; there are 'txt', 'label'"),
    "column twice.csv": (b"text,text,label\na,b,1\n", "stands twice"),
    "label null.csv": (b"text,label\na,\nb,1\n", "column 'label' has an empty cell in row 0"),
    "label empty.csv": (b"text,label\na,x\nb,\n", "column 'label' has an empty cell in row 1"),
    "text null.csv": (b"text,label\na,0\n,1\n" * 3, "column 'text' has an empty cell in row 1"),
    "text blank.csv": (b"text,label\na,0\n  ,1\n" * 3, "column 'text' has '  ' in row 1"),
    "text number.jsonl": (jsonl({"text": 1, "label": 0}, {"text": 2, "label": 1}), "column 'text' has 1 in row 0"),
    "latin.csv": (GOOD.replace(b"a b", b"caf\xe9"), "invalid UTF8"),
    "latin.jsonl": (b'{"text": "caf\xe9", "label": 1}\n{"text": "b", "label": 0}\n', "column 'text' is not UTF-8"),
    "latin label.csv": (GOOD.replace(b",1", b",caf\xe9"), "'label' holds binary"),
    "utf16.csv": (GOOD.decode().encode("utf-16"), "cannot be read"),
    "ragged.csv": (b"text,label\na,1\nb\n", "Expected 2 columns"),
    "array.json": (b'[{"text": "a", "label": 1}]', "cannot be read"),
    "mixed.jsonl": (jsonl({"text": "a", "label": 1}, {"text": "b", "label": "x"}), "cannot be read"),
    "lists.jsonl": (jsonl({"text": "a", "label": [1]}, {"text": "b", "label": [2]}), "'label' holds list"),
    "structs.jsonl": (jsonl({"text": {"a": 1}, "label": 1}), "'text' holds struct"),
    "dates.parquet": (pa.table({"text": ["a"], "label": [datetime.date(2020, 1, 1)]}), "'label' holds date"),
    "broken.parquet": (b"PAR1" + b"\0" * 100 + b"PAR1", "cannot be read"),
    "cut.parquet": (b"PAR1xxxx", "cannot be read"),
    "negative.csv": (GOOD.replace(b",0", b",-1"), "label -1 is no class id"),
    "identifiers.csv": (GOOD.replace(b",0", b",90000000"), "label 90000000 is no class id"),
    "table.xlsx": (b"PK", "unknown kind of file '.xlsx'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(tmp_path, name):
    data, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as raised:
        load(tmp_path, name, data)
    assert name in str(raised.value) and raised.value.exit_code == 3 and str(raised.value).isprintable()


@pytest.mark.parametrize(("cell", "shown"), [("inf", "inf"), ("1e300", "1e\\+300"), ("x", "x"), ("true", "True")])
def test_targets_that_are_no_numbers(tmp_path, cell, shown):
    with pytest.raises(InputError, match=f"target '?{shown}'? in row 0 is not a finite number"):
        load(tmp_path, "a.csv", b"text,label\n" + f"a,{cell}\n".encode() * 6, kind="regression")


DISAGREE = {
    "label 'other' in row 1 is not one of the 2 classes": (b"no\nb,yes", b"no\nb,other"),
    "label 2 in row 0 is not one of the 2 classes": (b"0\nb,1", b"2\nb,1"),
    "label 'no' in row 0 is not one of": (b"0\nb,1", b"no\nb,yes"),
    "holds numbers, that of the training rows names": (b"no\nb,yes", b"0\nb,1"),
}


@pytest.mark.parametrize("message", DISAGREE)
def test_39_labels_that_disagree(tmp_path, message):
    for name, cells in zip(("train.csv", "validation.csv"), DISAGREE[message], strict=True):
        (tmp_path / name).write_bytes(b"text,label\na," + cells + b"\n")
    with pytest.raises(InputError, match=message) as raised:
        load_examples(load_task(task("train.csv", "validation.csv"), root=tmp_path), "validation", root=tmp_path)
    assert "validation.csv" in str(raised.value)


def test_given_labels_rule(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,label\na,yes\nb,no\nc,maybe\n" + b"d,no\n" * 5)
    with pytest.raises(InputError, match="label 'maybe' in row 2"):
        load_examples(task("a.csv", labels=("no", "yes")), "train", root=tmp_path)
    rows = load_examples(task("a.csv", labels=("no", "yes", "maybe")), "train", root=tmp_path)
    assert list(rows.labels[:3]) == [1, 0, 2]


@pytest.mark.parametrize(
    ("recorded", "labels", "fits"),
    [
        (["no", "yes"], ("no", "yes"), True),
        (["no", "yes"], ("yes", "no"), False),
        (["no", "yes"], ("no", "yes", "maybe"), False),
        (["0", "1"], ("no", "yes"), True),  # ids may mean these names
        (["no", "yes"], ("0", "1"), True),
        (5, ("no", "yes"), True),
    ],
)
def test_27_classes_of_a_head(recorded, labels, fits):
    given = task("a.csv", labels=labels)
    if fits:
        require_same_classes(given, recorded, "mine")
        return
    with pytest.raises(InputError, match=r"trained on the classes no, yes, task 't' has") as raised:
        require_same_classes(given, recorded, "mine")
    assert "same order" in raised.value.hint


def test_wrong_calls(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "short.csv").write_bytes(b"text,label\na,0\nb,1\n")
    for name in ("absent.csv", "folder.csv"):
        with pytest.raises(InputError, match=r"no such file|not a regular file"):
            load_task(task(name), root=tmp_path)
    with pytest.raises(InputError, match="no rows"):
        load_examples(load_task(task("short.csv"), root=tmp_path), "validation", root=tmp_path)
    with pytest.raises(UsageError, match="split 'test'"):
        load_examples(task("short.csv"), "test", root=tmp_path)
    for changed in ({"kind": "ranking"}, {"text": ()}, {"text": ("a", "b", "c")}):
        with pytest.raises(PlaitError, match="task t"):
            task("a.csv", **changed)
    with pytest.raises(UsageError, match="class names are not known"):
        _ = task("a.csv").num_labels


# --- rows with an empty cell ------------------------------------------------------------------------------------------

HOLES = b"text,label\n" + b"a b,x\n,x\n  ,y\nc d,\ne f,y\n" * 4


def test_rows_with_an_empty_cell_are_skipped_where_that_is_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"empty: skip in the recipe's task, or --set tasks\.t\.empty=skip"):
        load(tmp_path, "holes.csv", HOLES)
    known, rows = load(tmp_path, "holes.csv", HOLES, empty="skip")
    held = load_examples(known, "validation", root=tmp_path)
    assert known.labels == ("x", "y")
    ids = [*rows.ids, *held.ids]
    assert sorted(ids) == [i for i in range(20) if i % 5 in (0, 4)]  # the rows keep their numbers
    assert all(i % 5 == 4 for i in held.ids) and {t for (t,) in rows.texts} == {"a b"}
    assert skipped_rows(known, root=tmp_path) == {"train": 12}
    assert skipped_rows(task("holes.csv"), root=tmp_path) == {}


def test_skipping_is_part_of_what_a_task_is_and_is_told(tmp_path, capsys, tiny_base):
    from plait.recipes.recipe_file import parse_settings
    from plait.runs.session import Session

    (tmp_path / "holes.csv").write_bytes(HOLES)
    entry = {"name": "t", "train": "holes.csv", "text": "text"}
    raw = {"base": {"model": tiny_base("bert").name}, "data": {"root": str(tmp_path)}, "training": {"steps": 1}}
    capsys.readouterr()  # what making the base said
    session = Session(parse_settings({**raw, "tasks": [{**entry, "empty": "skip"}]}, "s"))
    assert session.data_identity("t")["empty"] == "skip" and len(session.training("t", 0)) == 4
    assert capsys.readouterr().err == "note: task t: 12 train rows with an empty cell are left out (empty: skip)\n"
    (tmp_path / "holes.csv").write_bytes(GOOD)
    assert "empty" not in Session(parse_settings({**raw, "tasks": [entry]}, "s")).data_identity("t")
    with pytest.raises(UsageError, match="expected skip"):
        task("holes.csv", empty="drop")


@pytest.mark.parametrize(
    ("kind", "labels"), [("classification", [0] * 8), ("regression", [0.0] * 8), ("causal", ("",) * 8)]
)
def test_rows_of_text_alone_have_labels_that_say_nothing(tmp_path, kind, labels):
    known, rows = load(tmp_path, "x.csv", b"text\n" + b"a b\nc d\n" * 5, kind=kind, label_column="")
    assert set(rows.texts) == {("a b",), ("c d",)} and list(rows.labels) == list(labels)
    assert isinstance(rows.labels, tuple) == (kind == "causal")
    assert kind == "causal" or rows.labels.dtype == (np.int64 if kind == "classification" else np.float32)
    assert known.labels == (("?", "??") if kind == "classification" else None)
    if kind == "classification":  # names that are known stay
        assert load(tmp_path, "x.csv", b"text\na b\n", label_column="", labels=("no", "yes"))[0].labels == ("no", "yes")


def test_a_model_that_reads_and_writes_apart_needs_answers(tmp_path):
    with pytest.raises(UsageError, match="decoder reads the answers"):
        load(tmp_path, "x.csv", b"text\na b\n", kind="seq2seq", label_column="")
