"""An adapter names the base that it was trained on: by that name it is loaded, merged and baked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from plait.disk.store import identity
from plait.model.base import BaseModel
from plait.training import Member, TrainingSettings, train_adapter, train_fleet
from tests.tiny import make_adapter, make_examples, make_task, save_model


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("named", "kept"), [("somebody/other", False), ("", False), ("somebody/Trained_on", True)])
def test_the_base_is_the_one_that_was_trained_on(tiny_base, tmp_path, together, named, kept):
    base = BaseModel(str(save_model(tmp_path / "trained-on", "bert", seed=5)), device="cpu")
    task, settings, out = make_task(), TrainingSettings(steps=1, batch_size=8), tmp_path / "out"
    start = replace(make_adapter(tiny_base("bert"), task, "bert"), base=named, revision="v1")
    rows, made = make_examples(task), identity("adapter", {})
    if together:
        train_fleet([Member(start, task, rows, settings, 0, out, made)], base)
    else:
        train_adapter(start, task, rows, base, settings, seed=0, out=out, identity=made)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ((named, "v1") if kept else (base.name, None))
