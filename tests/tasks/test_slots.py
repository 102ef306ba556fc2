"""Slots of JSON answers, and several right answers: values worked out by hand, and a slow twin."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import InputError, UsageError
from plait.evaluation.bootstrap import weighted_score
from plait.evaluation.text import compared, fill_compared, unmeasured
from plait.tasks import Examples, Source, Task, load_examples, score
from plait.tasks.answers import require_slots
from plait.tasks.metrics import OPEN, rouge_l
from plait.tasks.slots import SlotCounts, slot_counts, slots_of

METRICS = ("slot_f1", "intent_accuracy", "exact_match")
RIGHT = '{"intent": "GetWeather", "city": "Serenada", "condition": "warmer"}'


def task(**options) -> Task:
    return Task("snips", "causal", Source("none"), ("text",), **{"metrics": METRICS, **options})


@pytest.mark.parametrize(
    ("written", "hits", "said", "intent"),
    [
        (RIGHT, 2, 2, True),
        ('{"condition": "warmer", "intent": "GetWeather", "city": "Serenada"}', 2, 2, True),  # in any order
        ('{"intent": "GetWeather", "city": "Oslo", "condition": "warmer"}', 1, 2, True),
        ('{"intent": "RateBook", "condition": "Serenada"}', 0, 1, False),  # the value of another slot
        ('{"city": "Serenada", "city": "Serenada"}', 1, 2, False),  # twice: once too often
        ('{"intent": "GetWeather", "city": ["Serenada", "Oslo"]}', 1, 2, True),
        ('{"intent": "GetWeather", "place": {"city": "Serenada"}}', 0, 1, True),
        (f"Sure: {RIGHT} and so on {{", 2, 2, True),
        ('{"intent": "GetWeather", "city": "Sere', 0, 0, False),  # cut off: no JSON
        ("[" * 100_000 + "{", 0, 0, False),
        ('{"a": ' + "[" * 100_000, 0, 0, False),
        ('["GetWeather"]', 0, 0, False),
        ("", 0, 0, False),
    ],
)
def test_slots_of_an_answer(written, hits, said, intent):
    assert slot_counts(written, RIGHT, task()) == SlotCounts(hits, said + 2, intent)


def test_values_are_compared_as_answers_are():
    other = RIGHT.replace("Serenada", "the  serenada.")
    assert [slot_counts(other, RIGHT, task(compare=c)).hits for c in (None, "case", "squad")] == [1, 1, 2]
    assert slots_of('{"n": 1200, "on": true}', task())[1] == Counter({("n", "1200"): 1, ("on", "true"): 1})
    assert slot_counts('{"n": "1,200"}', '{"n": 1200.0}', task(compare="number")).hits == 1
    assert slot_counts(f"{RIGHT}\n{{}}", RIGHT, task(stop="\n")).hits == 2
    assert slot_counts(f"{{}} JSON: {RIGHT}", RIGHT, task(extract=r"JSON: (.*)")).hits == 2


SLOTS = st.dictionaries(st.sampled_from("abc"), st.sampled_from("xy"), max_size=3)
ANSWERS = st.lists(st.tuples(SLOTS, SLOTS), min_size=1, max_size=8)


@given(ANSWERS)
def test_slot_f1_is_micro_over_all_rows(pairs):
    """As precision and recall of the pairs of all rows, row number included, taken as sets."""
    written, right = ([json.dumps(x) for x in side] for side in zip(*pairs, strict=True))
    examples = Examples((("q",),) * len(pairs), tuple(right))
    measured = unmeasured(task(), len(pairs))
    fill_compared(measured, task(), written, examples)
    said, asked = ({(i, *x) for i, p in enumerate(pairs) for x in p[side].items()} for side in (0, 1))
    precision, recall = (len(said & asked) / len(x) if x else 0.0 for x in (said, asked))
    f1 = 200 * precision * recall / (precision + recall) if precision + recall else 0.0
    labels = np.full(len(pairs), OPEN)
    assert score("slot_f1", measured, labels) == pytest.approx(f1)
    assert score("intent_accuracy", measured, labels) == 100.0  # none is said and none is asked for


def test_the_bootstrap_weighs_rows():
    right = ('{"intent": "A", "x": "1", "y": "2"}', '{"intent": "B", "x": "1"}')
    written = ['{"intent": "A", "x": "1", "y": "3"}', '{"intent": "A", "x": "1"}']
    measured, labels = unmeasured(task(), 2), np.full(2, OPEN)
    fill_compared(measured, task(), written, Examples((("q",),) * 2, right))
    assert measured[:, 4:].tolist() == [[1, 4, 1], [1, 2, 0]] and measured[:, 0].tolist() == [0, 0]
    weights = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    assert weighted_score(["slot_f1"], measured, labels, weights).tolist() == pytest.approx([200 / 3, 50, 100])
    assert weighted_score(["intent_accuracy"], measured, labels, weights).tolist() == [50, 100, 0]
    assert unmeasured(task(metrics=("rouge_l",)), 2).shape == (2, 4)  # others stay as narrow as they were


def test_of_several_right_answers_the_best_counts():
    examples = Examples(
        (("q",),) * 2, ("the cat sat", "one"), np.arange(2), (("a cat was sitting there", "a cat sat"), ("1", "One"))
    )
    found = compared(task(compare="case", metrics=("rouge_l",)), ["a cat sat", "ONE"], examples)
    assert found.tolist() == [[1, 100], [1, 100]]
    found = compared(task(metrics=("rouge_l",)), ["the big cat", "two"], examples)
    assert found[:, 0].tolist() == [0, 0] and found[0, 1] == pytest.approx(200 * 2 / 6) and found[1, 1] == 0
    turned = examples.take([1, 0])
    assert turned.references == examples.references[::-1] and turned.right[0] == ("one", "1", "One")
    assert score("rouge_l", ["the cat sat"], ["the cat slept"]) == pytest.approx(200 / 3)


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=7).map(" ".join)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_rouge_l_is_that_of_rouge_score(written, right):
    rouge = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    expected = 100 * rouge.score_multi(right, written)["rougeL"].fmeasure
    assert max(rouge_l(written, y) for y in right) == pytest.approx(expected)


def test_references_and_json_are_read_and_checked(tmp_path):
    def rows(*cells):
        lines = [{"q": "w", "answer": "one", **({} if c is None else {"references": c})} for c in cells]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))

    one = Task(
        "t",
        "causal",
        Source("rows.jsonl", "rows.jsonl"),
        ("q",),
        "answer",
        metrics=("rouge_l",),
        references="references",
    )
    rows(["1", " One "], ["eins"])
    assert load_examples(one, "validation", root=tmp_path).references == (("1", "One"), ("eins",))
    assert load_examples(one, "validation", root=tmp_path, rows=1).right[0][0] == "one"
    assert load_examples(one, "train", root=tmp_path).references is None
    for cell in ([], [""], None):
        rows(["1"], cell)
        with pytest.raises(InputError, match="'references' has no list of right answers in row 1"):
            load_examples(one, "validation", root=tmp_path)
    rows(None, None)
    assert len(load_examples(one, "train", root=tmp_path)) == 2  # rows that are trained on need none
    with pytest.raises(InputError, match="no column 'references'"):
        load_examples(one, "validation", root=tmp_path)
    with pytest.raises(UsageError, match="answers that are written"):
        Task("t", "causal", Source("x"), ("q",), labels=("a", "b"), references="references")
    slots = Task("t", "causal", Source("rows.jsonl"), ("q",), "answer", metrics=("slot_f1",))
    with pytest.raises(InputError, match="the answer in row 0 is no JSON object"):
        load_examples(slots, "train", root=tmp_path)


def test_answers_none_of_which_has_an_intent_are_refused_where_intents_are_compared():
    rows = ['{"Intent": "GetWeather", "city": "Oslo"}', '{"Intent": "PlayMusic"}']
    measured = [slot_counts('{"Intent": "wrong"}', row, task()).intent for row in rows]
    assert measured == [True, True]  # which is why
    with pytest.raises(InputError, match="no answer has the key 'intent'; there are Intent, city"):
        require_slots(task(metrics=("intent_accuracy",)), rows, range(2), "here")
    require_slots(task(metrics=("slot_f1",)), rows, range(2), "here")
    require_slots(task(metrics=("intent_accuracy",)), [*rows, '{"intent": "x"}'], range(3), "here")
