"""Numbers as answers and as classes: what is written is what stands in the file, and a number is no place among other numbers."""

from __future__ import annotations

import pytest

from plait.errors import InputError
from plait.tasks import load_examples
from tests.tasks.test_rows import jsonl, load


def test_known_answers_of_fractions_are_no_places_among_them(tmp_path):
    (tmp_path / "v.csv").write_bytes(b"text,label\na,0\nb,3\nc,2.5\n")
    known, rows = load(tmp_path, "t.csv", b"text,label\na,3\nb,2.5\nc,0\n", kind="causal", validation="v.csv")
    assert known.labels == ("0", "2.5", "3") and rows.labels == ("3", "2.5", "0")
    assert load_examples(known, "validation", root=tmp_path).labels == ("0", "3", "2.5")
    (tmp_path / "v.csv").write_bytes(b"text,label\na,0\nb,1\n")
    assert load_examples(known, "validation", root=tmp_path).labels == ("0", "1")  # not "2.5", the second of them


def test_a_whole_number_among_fractions_is_written_as_one(tmp_path):
    data = jsonl({"text": "a", "label": 72}, {"text": "b", "label": 3.5})
    assert load(tmp_path, "t.jsonl", data, kind="causal", metrics=("rouge_l",))[1].labels[:2] == ("72", "3.5")


def test_an_empty_cell_among_numbers_is_none_of_them(tmp_path):
    with pytest.raises(InputError, match="an empty cell in row 1"):
        load(tmp_path, "t.csv", b"text,label\na,1\nb,NA\nc,2.5\n", kind="causal")


def test_classes_that_are_called_by_numbers_are_these_numbers(tmp_path):
    rows = load(tmp_path, "t.csv", b"text,label\na,1\nb,5\nc,1\n", labels=("5", "1"))[1]
    assert rows.labels.tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="label 0 in row 0 is not one of the 2 classes"):
        load(tmp_path, "t.csv", b"text,label\na,0\nb,1\n", labels=("5", "1"))
