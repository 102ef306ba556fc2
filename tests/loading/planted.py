"""Adapter folders made by PEFT itself, faults planted in them, and where PEFT really puts each of their tensors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Config = dict[str, Any]
ROOT = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"


def causal(tied: bool = False) -> nn.Module:
    """A tiny Llama; its two layers have q, k, v, o and an MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)).eval()


def classifier() -> nn.Module:
    """A tiny BERT with a classification head."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **sizes)
    ).eval()


def conv1d() -> nn.Module:
    """A tiny GPT-2, whose modules are Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


def save_adapter(folder: Path, base: nn.Module, seed: int = 7, **config: Any) -> Path:
    """An adapter of this config, all its numbers random, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, **config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(folder))
    return folder


def change(folder: Path, edit: Callable[[Tensors, Config], None]) -> Path:
    """Edit a folder's tensors and config in place."""
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    edit(tensors, config)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def placed_by_peft(folder: Path, base: nn.Module) -> Mapping[str, set[str]] | str:
    """Tensor -> the parameters that hold its numbers once PEFT has loaded the folder; or the error's type."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = PeftModel.from_pretrained(base, str(folder))
        except Exception as e:
            return type(e).__name__
    state = model.state_dict()
    return {
        name: {k for k, v in state.items() if v.shape == t.shape and torch.equal(v, t)}
        for name, t in load_file(folder / "adapter_model.safetensors").items()
    }


def rename(old: str, new: str) -> Callable[[Tensors, Config], None]:
    """Replace a text in every tensor's name."""

    def edit(tensors: Tensors, config: Config) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


def drop(part: str) -> Callable[[Tensors, Config], None]:
    """Leave out tensors whose name holds a text."""

    def edit(tensors: Tensors, config: Config) -> None:
        for name in [n for n in tensors if part in n]:
            del tensors[name]

    return edit


def add(name: str, *shape: int) -> Callable[[Tensors, Config], None]:
    """Add a random tensor."""

    def edit(tensors: Tensors, config: Config) -> None:
        tensors[name] = torch.randn(*shape, generator=torch.Generator().manual_seed(3))

    return edit


def configure(**values: Any) -> Callable[[Tensors, Config], None]:
    """Set keys of the config."""

    def edit(tensors: Tensors, config: Config) -> None:
        config.update(values)

    return edit


def both(*edits: Callable[[Tensors, Config], None]) -> Callable[[Tensors, Config], None]:
    """One edit after another."""

    def edit(tensors: Tensors, config: Config) -> None:
        for one in edits:
            one(tensors, config)

    return edit


def turned(tensors: Tensors, config: Config) -> None:
    """Factors of a linear module named and laid out as those of an embedding are."""
    a, b = (tensors.pop(f"{ROOT}{Q0}.lora_{half}.weight") for half in "AB")
    tensors |= {f"{ROOT}{Q0}.lora_embedding_A": b.T, f"{ROOT}{Q0}.lora_embedding_B": a.T}


def as_linear(tensors: Tensors, config: Config) -> None:
    """Factors of an embedding named as those of a linear module."""
    name = f"{ROOT}model.embed_tokens.lora_embedding_"
    tensors |= {f"{ROOT}model.embed_tokens.lora_{half}.weight": tensors.pop(name + half) for half in "AB"}
