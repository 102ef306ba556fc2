"""Bakes into bases whose embedding is more than an embedding, and into square weights, against base + adapter in PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.peft_format import read_adapter
from plait.errors import InputError
from plait.merging.bake.baking import bake
from plait.model.conv1d import is_turned

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings=True"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip
WHISPER = {
    "vocab_size": 64, "d_model": 32, "num_mel_bins": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 10,
    "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
KINDS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "tied llama": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SIZES | {"head_dim": 8}),
    "ctrl": ("CTRLLMHeadModel", "CTRLConfig", {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4}),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", SIZES),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
}  # fmt: skip


def changed(path: Path, **fields: object) -> None:
    """Writes other fields into a JSON file; None takes one out."""
    raw = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def saved(kind: str, folder: Path, *, silent: bool = False) -> Path:
    """A tiny base; `silent` as transformers 4 saves one that ties as its class does."""
    import transformers as hf

    name, config, sizes = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(hf, name)(getattr(hf, config)(**sizes))
    for name, parameter in model.named_parameters():  # biases too: a base that was trained has some
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim == 2 or name.endswith("bias") else None
    model.save_pretrained(folder)
    if silent:
        changed(folder / "config.json", tie_word_embeddings=None)
    return folder


def loaded(kind: str, folder: Path):
    import transformers as hf

    return getattr(hf, KINDS[kind][0]).from_pretrained(folder).eval()


def output(model) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    spoken = torch.linspace(-1, 1, 2 * 8 * 20).view(2, 8, 20)
    with torch.no_grad():
        return model(spoken if model.config.model_type == "whisper" else IDS, **more).logits


def far(kind: str, base: Path, targets: list[str], tmp_path: Path, **fields: object) -> tuple[float, bool]:
    """How far a bake of an adapter is from the adapter on its base, as a share of its effect; and whether it says that it untied."""
    import peft

    model = loaded(kind, base)
    before = output(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    changed(tmp_path / "a" / "adapter_config.json", **fields)
    wanted = output(peft.PeftModel.from_pretrained(loaded(kind, base), tmp_path / "a"))
    done = bake(read_adapter(tmp_path / "a"), base, tmp_path / "out")
    found = output(loaded(kind, tmp_path / "out"))
    return float((found - wanted).norm() / (wanted - before).norm()), done.record.untied


@pytest.mark.parametrize(
    ("kind", "targets", "untied"),
    [
        ("gpt2", ["wte"], True),
        ("gpt2", ["lm_head", "c_attn"], True),
        ("gpt2", ["wpe"], False),
        ("gemma2", ["embed_tokens"], True),
        ("bert", ["word_embeddings"], True),
        ("bert", ["decoder", "query"], True),
        ("roberta", ["word_embeddings", "query"], True),
        ("whisper", ["embed_tokens"], True),
        ("whisper", ["proj_out", "q_proj"], True),
        ("bert", ["token_type_embeddings"], False),
    ],
)
@pytest.mark.parametrize("silent", [False, True])
def test_a_tie_is_the_model_s_whatever_the_config_leaves_out(tmp_path, kind, targets, untied, silent):
    base = saved(kind, tmp_path / "base", silent=silent)
    error, said = far(kind, base, targets, tmp_path)
    assert error < 1e-5 and said is untied


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_files_that_hold_both_ends_of_a_tie(tmp_path, targets):
    base = saved("tied llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    error, said = far("tied llama", base, targets, tmp_path)
    assert error < 1e-5 and said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert not bake(read_adapter(tmp_path / "a"), base, tmp_path / "out").record.beside


def test_an_embedding_of_encoder_and_decoder(tmp_path):
    """Of the output layer alone an update has a place; the config goes on tying the other two."""
    base = saved("bart", tmp_path / "base")
    (tmp_path / "shared").mkdir()
    error, said = far("bart", base, ["lm_head", "q_proj"], tmp_path)
    assert error < 1e-5 and said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    told = bake(read_adapter(tmp_path / "a"), base, tmp_path / "out").record.beside
    assert any("transformers 4 ties lm_head again, and its update is lost" in line for line in told)
    with pytest.raises(InputError, match=r"one tensor with model\.decoder\.embed_tokens\.weight and model\.encoder"):
        far("bart", base, ["shared"], tmp_path / "shared")
    assert not (tmp_path / "shared" / "out").exists()


def test_a_square_weight_lies_as_the_model_has_it(tmp_path):
    """CTRL's layers are linear ones, and a Llama's are whatever an adapter of a quantised one says of Conv1D."""
    for kind, targets, flag in (
        ("ctrl", ["Wq", "Wv"], False),
        ("llama", ["q_proj"], True),
        ("gpt2", ["c_proj"], False),
    ):
        place = tmp_path / kind
        place.mkdir()
        error, _ = far(kind, saved(kind, place / "base"), targets, place, fan_in_fan_out=flag)
        assert error < 1e-5, kind
    assert is_turned("of-their-own", True, (4, 4), (4, 4)) and not is_turned("of-their-own", False, (4, 4), (4, 4))
    assert is_turned("clvp", True, (4, 8), (8, 4)) and not is_turned("clvp", True, (4, 8), (4, 8))
