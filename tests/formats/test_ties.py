"""Conversions by a base whose config leaves its ties out, or whose square weights lie as the adapter does not say, against PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plait.adapters.peft_format import read_adapter
from plait.errors import InputError
from plait.formats.convert import convert
from plait.formats.gguf_file import TIED
from plait.formats.gguf_names import ARCHITECTURES
from plait.formats.plain import Means
from tests.merging.test_bake_ties import changed, loaded, output, saved

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings=True"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]


def trained(model, folder: Path, **lora) -> None:
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **lora))
    generator = torch.Generator().manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder, save_embedding_layers=False)


def far(kind: str, base: Path, tmp_path: Path, lora: dict, **fields: object) -> float:
    """How far a converted adapter is from itself, both as PEFT loads them, as a share of its effect."""
    import peft

    before = output(loaded(kind, base))
    trained(loaded(kind, base), tmp_path / "a", **lora)
    changed(tmp_path / "a" / "adapter_config.json", **fields)
    wrapped = peft.PeftModel.from_pretrained(loaded(kind, base), tmp_path / "a")
    wanted = output(
        wrapped.merge_and_unload()
    )  # before, PEFT 0.21 leaves the bias of an output layer with trained rows out
    convert(tmp_path / "a", tmp_path / "plain", means=Means(base=base, rank=64))
    found = output(peft.PeftModel.from_pretrained(loaded(kind, base), tmp_path / "plain"))
    return float((found - wanted).norm() / (wanted - before).norm())


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [5, 6, 7]}),
        ("gemma2", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]}),
        ("bert", {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [5, 6, 7]}}),
    ],
)
@pytest.mark.parametrize("silent", [False, True])
def test_trained_tokens_move_the_output_that_is_tied(tmp_path, kind, lora, silent):
    assert far(kind, saved(kind, tmp_path / "base", silent=silent), tmp_path, lora) < 1e-5


def test_a_classifier_has_no_output_that_is_tied(tmp_path):
    """Its base may: BERT's own files are those of a masked language model."""
    import transformers as hf

    base = saved("bert", tmp_path / "base", silent=True)
    model = hf.AutoModelForSequenceClassification.from_pretrained(base)
    tokens = {"embeddings.word_embeddings": [5, 6, 7]}
    trained(model, tmp_path / "a", task_type="SEQ_CLS", target_modules=["query"], trainable_token_indices=tokens)
    convert(tmp_path / "a", tmp_path / "plain", means=Means(base=base))
    assert {m.rpartition(".")[2] for m in read_adapter(tmp_path / "plain").modules} == {"query", "word_embeddings"}


def test_tokens_of_an_embedding_in_several_places_are_refused(tmp_path):
    base = saved("bart", tmp_path / "base")
    lora = {"target_modules": ["q_proj"], "trainable_token_indices": {"shared": [5, 6]}}
    with pytest.raises(InputError, match=r"one tensor with model\.decoder"):
        far("bart", base, tmp_path, lora)


@pytest.mark.parametrize(("kind", "target", "flag"), [("gpt2", "attn.c_proj", False), ("llama", "q_proj", True)])
def test_dora_of_a_square_weight(tmp_path, kind, target, flag):
    """What the adapter's config says of Conv1D is the last layer's that PEFT met, or of a quantised base, which it never asks."""
    lora = {"target_modules": [target], "use_dora": True}
    assert far(kind, saved(kind, tmp_path / "base"), tmp_path, lora, fan_in_fan_out=flag) < 1e-5


def test_what_llama_cpp_s_architectures_tie_where_a_config_does_not_say():
    import transformers as hf

    tied = {kind for kind in ARCHITECTURES if hf.CONFIG_MAPPING[kind]().tie_word_embeddings}
    assert tied == set(TIED)
