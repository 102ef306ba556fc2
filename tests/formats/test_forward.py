"""Variants turned into plain LoRA and loaded by PEFT again: the same logits as PEFT's own forward pass of the variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from plait.formats.convert import convert
from plait.formats.plain import Means

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "t5": ["q", "wo"]}
IDS = torch.arange(4, 28).view(2, 12)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Adapter 'default'",
    "ignore:.*lora_bias=True.*",
    "ignore:.*tied.*",
    "ignore:fan_in_fan_out is set",
    "ignore:.*embedding.*",
)


def loaded(base: str, architecture: str) -> Any:
    import transformers

    kind = "AutoModelForSeq2SeqLM" if architecture == "t5" else "AutoModelForCausalLM"
    return getattr(transformers, kind).from_pretrained(base)


def logits(model: Any, architecture: str) -> torch.Tensor:
    more = {"decoder_input_ids": IDS.flip(1)} if architecture == "t5" else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **more).logits


def variant(tiny_base, architecture: str, folder: Path, size: float = 0.3, **options) -> tuple[str, Any]:
    """A folder that PEFT saved, every trained tensor changed at random; and the wrapped model."""
    import peft

    base = tiny_base(architecture).name
    config = {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": TARGETS[architecture],
        "task_type": "SEQ_2_SEQ_LM" if architecture == "t5" else "CAUSAL_LM",
        "fan_in_fan_out": architecture == "gpt2",
    }
    wrapped = peft.get_peft_model(loaded(base, architecture), peft.LoraConfig(**config | options))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and size:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += size * noise if "lora_A" not in name else 0.1 * noise
    wrapped.save_pretrained(folder)
    return base, wrapped


def again(base: str, architecture: str, folder: Path) -> torch.Tensor:
    import peft

    return logits(peft.PeftModel.from_pretrained(loaded(base, architecture), folder), architecture)


EXACT = [
    ("llama", {"use_dora": True}),
    ("llama", {"use_dora": True, "use_rslora": True, "rank_pattern": {"down_proj": 5}}),
    ("gpt2", {"use_dora": True}),
    ("t5", {"use_dora": True}),
    ("llama", {"use_rslora": True}),
    ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 3}}),
    ("gpt2", {"use_rslora": True}),
    ("llama", {"modules_to_save": ["embed_tokens"]}),
    ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("gpt2", {"modules_to_save": ["wte"]}),
    ("llama", {"trainable_token_indices": [4, 9, 20]}),
    ("gpt2", {"trainable_token_indices": [4, 9, 20]}),
    ("llama", {"use_dora": True, "modules_to_save": ["lm_head"]}),
]


@pytest.mark.parametrize(("architecture", "options"), EXACT, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_exact_conversions_have_pefts_logits(tiny_base, tmp_path, architecture, options):
    base, wrapped = variant(tiny_base, architecture, tmp_path / "own", **options)
    wanted, bare = logits(wrapped, architecture), logits(loaded(base, architecture), architecture)
    found = convert(tmp_path / "own", tmp_path / "plain", means=Means(base=Path(base), rank=96))
    assert all(c.exact for c in found.record.conversions)
    assert float((wanted - bare).norm()) > 0.01 * float(bare.norm()), "the variant does something"
    torch.testing.assert_close(again(base, architecture, tmp_path / "plain"), wanted, rtol=1e-3, atol=2e-4)


def test_a_stated_error_is_what_the_logits_show(tiny_base, tmp_path):
    """A lower rank is off by more, states more, and at no rank by more than the update itself."""
    base, wrapped = variant(tiny_base, "llama", tmp_path / "own", use_dora=True)
    wanted, bare = logits(wrapped, "llama"), logits(loaded(base, "llama"), "llama")
    stated, off = [], []
    for rank in (2, 8, 24):
        found = convert(tmp_path / "own", tmp_path / str(rank), means=Means(base=Path(base), rank=rank))
        stated.append(found.record.conversions[0].relative_error)
        off.append(float((again(base, "llama", tmp_path / str(rank)) - wanted).norm() / (wanted - bare).norm()))
    assert stated == sorted(stated, reverse=True) and off == sorted(off, reverse=True)
    assert stated[0] > 0.1 and off[0] < 1 and off[2] < 0.2


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_biases_of_zero_are_exact_and_others_are_what_is_left_out(tiny_base, tmp_path, architecture):
    base, wrapped = variant(tiny_base, architecture, tmp_path / "own", lora_bias=True)
    with_bias = logits(wrapped, architecture)
    convert(tmp_path / "own", tmp_path / "plain", means=Means(drop_bias=True))
    for name, parameter in wrapped.named_parameters():
        if name.endswith("lora_B.default.bias"):
            parameter.data.zero_()
    without = logits(wrapped, architecture)
    assert float((with_bias - without).norm()) > 1e-3
    torch.testing.assert_close(again(base, architecture, tmp_path / "plain"), without, rtol=1e-3, atol=2e-4)
    wrapped.save_pretrained(tmp_path / "zero")
    assert convert(tmp_path / "zero", tmp_path / "plain2").record.conversions[0].exact
    torch.testing.assert_close(again(base, architecture, tmp_path / "plain2"), without, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_in_the_base_is_subtracted(tiny_base, tmp_path, init):
    base, wrapped = variant(tiny_base, "llama", tmp_path / "start", size=0, init_lora_weights=init)
    generator = torch.Generator().manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path / "own")
    wanted = logits(wrapped, "llama")
    found = convert(tmp_path / "own", tmp_path / "plain", means=Means(initial=tmp_path / "start"))
    assert found.record.conversions[0].exact
    torch.testing.assert_close(again(base, "llama", tmp_path / "plain"), wanted, rtol=1e-3, atol=2e-4)
