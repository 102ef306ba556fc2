"""The demo's own floor: a linear model on the frozen base, equal to one made by hand, and said where it beats an adapter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.demo.probe import Floor, floors, floors_text, probe
from plait.disk.store import identity, staged_folder
from plait.runs.session import Session


def by_hand(session, name) -> float:
    """The same from transformers and scikit-learn, a row at a time."""
    import transformers as hf
    from sklearn.linear_model import LogisticRegression, Ridge

    base, task = session.base.name, session.tasks[name]
    tokenizer, model = hf.AutoTokenizer.from_pretrained(base), hf.AutoModel.from_pretrained(base).eval()

    def vectors(examples):
        rows = []
        for text in examples.texts:
            with torch.no_grad():
                mean = model(**tokenizer(*text, return_tensors="pt")).last_hidden_state[0].mean(0)
            rows.append((mean / mean.norm()).double().numpy())
        return np.stack(rows)

    known, asked = session.training(name, 0), session.validation(name)
    if task.kind == "regression":
        found = Ridge(alpha=1.0).fit(vectors(known), known.labels).predict(vectors(asked))
        pearson = np.corrcoef(found, asked.labels)[0, 1]
        ranks = [np.argsort(np.argsort(x)) for x in (found, asked.labels)]
        return 100 * (pearson if task.metrics == ("pearson",) else np.corrcoef(*ranks)[0, 1])
    model_of = LogisticRegression(max_iter=2000).fit(vectors(known), known.labels)
    return 100 * float((model_of.predict(vectors(asked)) == asked.labels).mean())


@pytest.mark.parametrize("name", ["topic", "pairs"])
def test_the_floor_is_a_linear_model_on_mean_token_vectors(tiny_recipe, name):
    session = Session(tiny_recipe("bert"))
    task = session.tasks[name]
    assert task.metrics == ("accuracy",) or task.kind == "classification"
    found = probe(session, task, session.training(name, 0), session.validation(name))
    assert found == pytest.approx(by_hand(session, name), abs=1e-6) and found > 0


def test_every_task_stands_beside_its_adapter_and_the_best_merge(tiny_recipe, tmp_path):
    recipe = tiny_recipe("bert")
    names = list(Session(recipe).tasks)
    result = {"scores_alone": dict.fromkeys(names, 50.0), "scores": dict.fromkeys(names, 40.0)}
    with staged_folder(tmp_path / "best", identity("best", {}), result=result):
        pass
    found = floors(recipe, tmp_path / "best")
    assert [f.task for f in found] == names and all(f.alone == 50.0 and f.merged == 40.0 for f in found)
    assert all(-100 <= f.frozen <= 100 for f in found) and any(f.frozen != found[0].frozen for f in found)


def test_what_beats_the_adapters_is_said():
    text = floors_text([Floor("clinc", 83.3, 61.0, 50.0), Floor("snli", 45.0, 58.0, 55.0)])
    assert "On clinc it beats the adapter" in text and "83.3" in text
    assert "beats" not in floors_text([Floor("snli", 45.0, 58.0, 55.0)])
