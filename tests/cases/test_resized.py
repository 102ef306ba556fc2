"""Adapters of a vocabulary that was resized before training, of which PEFT saves the whole embedding modules."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plait.adapters.peft_format import read_adapter
from plait.errors import InputError
from tests.cases.conftest import changed_tensors, far, llama, loaded, logits, trained
from tests.loading.planted import placed_by_peft

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting .save_embedding_layers.", "ignore:Model (has|with) .tie_word_embeddings=True", "ignore:.*tie.*"
)


def resized(tied: bool) -> Any:
    model = llama(tied=tied)
    torch.manual_seed(0)
    model.resize_token_embeddings(68)
    return model


@pytest.mark.parametrize(
    ("tied", "fields"),
    [
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (True, {"trainable_token_indices": [65, 66, 67]}),
    ],
)
def test_what_peft_saves_of_a_resized_vocabulary_is_no_second_weight(tied, fields, plait, tmp_path):
    """Each weight of a module kept whole a second time and the base's beside it, and the base's under trained rows."""
    llama(tied=tied).save_pretrained(tmp_path / "in/base")
    resized(tied).save_pretrained(tmp_path / "in/resized")
    wanted = trained(tmp_path / "in/a", resized(tied), **fields)
    names = list(load_file(tmp_path / "in/a/adapter_model.safetensors"))
    assert any(".original_module." in n or ".token_adapter.base_layer." in n for n in names)
    code, out, err = plait("check in/a")
    assert code == 0, out + err
    placed = placed_by_peft(tmp_path / "in/a", resized(tied))
    for said in json.loads(plait("check in/a --json")[1])["accounts"][0]["placements"]:
        assert not said["parameter"] or said["parameter"] in placed[said["tensor"]]
    made = ["convert in/a --base in/resized --rank 64 --out plain"]
    made += ["merge in/a --out merged"] if "modules_to_save" in fields else []
    for command in made:
        code, out, err = plait(command)
        assert code == 0, err
        found = logits(loaded(command.split()[-1], resized(tied)))
        assert far(found, wanted, logits(resized(tied))) < 1e-5
        assert not any(
            "original_module" in n for n in load_file(tmp_path / command.split()[-1] / "adapter_model.safetensors")
        )


def test_two_weights_of_one_module_that_differ_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama(tied=False).save_pretrained(tmp_path / "in/base")
    trained(tmp_path / "in/a", resized(False), modules_to_save=["embed_tokens", "lm_head"])
    name = "base_model.model.lm_head.modules_to_save.weight"
    changed_tensors(tmp_path / "in/a", lambda t: {**t, name: t[name] + 1})
    with pytest.raises(InputError, match=r"'lm_head.modules_to_save.weight' and 'lm_head.weight' differ"):
        read_adapter(tmp_path / "in/a")
