"""Heads that answer for every token: their tensors fit a text classifier's model, where their answers mean nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import plait
from plait.adapters.peft_format import read_adapter
from plait.advice.advise import advise
from plait.choosing.auto import merge_auto
from plait.choosing.auto_folders import merge_auto_folders
from plait.cli.measuring import measured_text
from plait.errors import InputError
from plait.fidelity.panel import parts_of
from plait.fidelity.serving import measure
from plait.merging import merge_folders
from plait.model.base import BaseModel
from plait.runs.single import evaluate
from plait.training.peft_model import for_task
from plait.trying.answers import tried
from plait.trying.inputs import trial_of
from plait.trying.page import text_of
from plait.trying.records import Prompts, TrySettings
from tests.classifiers import classifier, quiet, saved_base, saved_classifier
from tests.panels import texts_of
from tests.tiny import make_task

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
REFUSED = "'tags' is of a TOKEN_CLS model"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path, Path]:
    """(base, a token classifier, a text classifier, their merge), the first two as PEFT saves them."""
    root = tmp_path_factory.mktemp("tokens")
    base = saved_base(root / "base", "bert")
    tags = saved_classifier(root / "tags", base, "bert", 3, task_type="TOKEN_CLS")
    texts = saved_classifier(root / "texts", base, "bert", 3, seed=1)
    merge_folders([tags, texts], root / "merged", method="task_arithmetic", scale=1.0)
    return base, tags, texts, root / "merged"


def test_where_predictions_are_asked_for_they_are_refused_by_name(folders):
    base, tags, texts, merged = folders
    given = {"tags": texts_of(3), "texts": texts_of(3)}
    with pytest.raises(InputError, match=REFUSED):
        merge_auto([read_adapter(tags), read_adapter(texts)], BaseModel(str(base)), given)
    with pytest.raises(InputError, match=REFUSED) as raised:
        advise([read_adapter(tags), read_adapter(texts)], BaseModel(str(base)), given)
    assert "leave it out, with the texts of it; or merge all without --text" in str(raised.value)
    assert advise([read_adapter(tags), read_adapter(texts)], BaseModel(str(base))).options  # from factors alone
    with pytest.raises(InputError) as raised:  # the other way round it is refused by the same words
        parts_of([read_adapter(texts), read_adapter(tags), replace(read_adapter(tags), name="more")])
    said = str(raised.value)
    assert said.startswith(f"tags: its head {REFUSED}") and "; nor can more (leave them out" in said
    with pytest.raises(InputError, match=REFUSED):
        parts_of([read_adapter(merged)])  # a merge says of each head what it is of
    with pytest.raises(InputError, match=REFUSED):
        tried(trial_of(str(tags), str(base), []), Prompts(texts_of(1)), TrySettings())
    with pytest.raises(InputError, match=REFUSED):
        measure([read_adapter(tags)], None, BaseModel(str(base)), {"tags": texts_of(3)})
    with pytest.raises(InputError, match=REFUSED):
        for_task(read_adapter(tags), make_task("tags", "classification", 3), classifier(base, 3))


def test_in_a_mixed_merge_the_others_are_tried_and_measured_and_it_is_refused_by_name(folders):
    """What is said of its neighbour is what is said of it beside nobody."""
    base, tags, texts, merged = folders
    rows = {"tags": texts_of(3), "texts": texts_of(3)}
    asked = Prompts(texts_of(1), {"tags": texts_of(2)})
    answers = tried(trial_of(str(merged), str(base), []), asked, TrySettings())
    assert [row.task for row in answers.rows] == ["texts"] and len(answers.rows[0].answers) == 3
    assert [m.name for m in answers.missing] == ["tags"] and REFUSED in answers.missing[0].why
    assert f"- tags is not tried: its head {REFUSED}" in text_of(answers, 200)
    with pytest.raises(InputError, match=REFUSED):  # nobody else is asked
        tried(trial_of(str(merged), str(base), []), Prompts((), {"tags": texts_of(2)}), TrySettings())

    both, merge, of = [read_adapter(tags), read_adapter(texts)], read_adapter(merged), BaseModel(str(base))
    found = measure(both, merge, of, rows, on_progress=(said := []).append)
    alone = measure(both[1:], merge, of, {"texts": rows["texts"]})
    assert found.tasks == ("texts",) and [r.task for r in found.refused] == ["tags"] and not alone.refused
    assert found.ways == alone.ways and found.ways[0].merged.tasks[0].fidelity.kl > 0
    assert any(line.startswith("tags is not measured") and REFUSED in line for line in said)
    assert "- tags is not measured: " in measured_text(found) and "tags" not in measured_text(alone)
    assert measure(both, merge, of, {"texts": rows["texts"]}).ways == alone.ways  # texts of it need not be there


def test_scores_are_refused_and_those_of_its_neighbour_are_not(folders):
    def rows(task):
        raise LookupError(task)

    tasks = {name: make_task(name, "classification", 3) for name in ("tags", "texts")}
    merged = read_adapter(folders[3])
    with pytest.raises(InputError, match=REFUSED):
        evaluate._evaluate(merged, SimpleNamespace(tasks=tasks, validation=rows), None, None, {})
    one = {"texts": tasks["texts"]}
    with pytest.raises(LookupError, match="texts"):
        evaluate._evaluate(merged, SimpleNamespace(tasks=one, validation=rows), None, None, {})


def test_without_texts_they_are_merged(folders, tmp_path):
    _, tags, texts, _ = folders
    merge_auto_folders([str(tags), str(texts)], tmp_path / "merged")
    assert set(read_adapter(tmp_path / "merged").heads) == {"tags", "texts"}


def test_a_head_goes_into_its_own_class_of_model_alone(folders):
    import transformers as hf

    base, tags, _, merged = folders
    with quiet():
        tokens = hf.AutoModelForTokenClassification.from_pretrained(base, num_labels=3)
    plait.load_head(tokens, merged, "tags")
    head = read_adapter(tags).heads["tags"]["classifier.weight"]
    np.testing.assert_array_equal(tokens.classifier.weight.detach(), head)
    sequence = classifier(base, 3)
    before = {k: v.clone() for k, v in sequence.state_dict().items()}
    with pytest.raises(InputError, match="for a model ForTokenClassification, this is BertForSequenceClassification"):
        plait.load_head(sequence, merged, "tags")
    assert all(torch.equal(v, before[k]) for k, v in sequence.state_dict().items())
    plait.load_head(sequence, merged, "texts")
    with pytest.raises(InputError, match="for a model ForSequenceClassification"):
        plait.load_head(tokens, merged, "texts")


def test_a_head_of_which_nobody_said_what_it_is_is_a_text_classifiers(folders):
    unknown = replace(read_adapter(folders[2]), task_type=None, head_facts={})
    assert [p.task.kind for p in parts_of([unknown])] == ["classification"]
