"""Tiny random mixtures of experts, and PEFT adapters of them with every factor random."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

IDS = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(0))
_SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixture(name: str, **changed: Any) -> Any:
    """A random model: "mixtral", "qwen3_moe" (on disk expert by expert) or "gpt_oss" (fused, stored transposed)."""
    import transformers as hf

    torch.manual_seed(0)
    sizes = {**_SIZES, **changed}
    if name == "mixtral":
        config = hf.MixtralConfig(**{"num_local_experts": 4, "num_experts_per_tok": 2, **sizes})
    elif name == "qwen3_moe":
        config = hf.Qwen3MoeConfig(
            **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 4, **sizes}
        )
    else:
        config = hf.GptOssConfig(**{"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, **sizes})
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # biases start at zero
        for p in model.parameters():
            if not bool(p.any()):
                p.normal_(0, 0.1)
    return model


def adapter(model: Any, folder: Path, seed: int, **options: Any) -> Path:
    """Train nothing: an adapter of random factors, saved by PEFT."""
    import peft

    options = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    with warnings.catch_warnings():  # patterns of parameters match no module, PEFT says
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    wrapped.peft_config["default"].base_model_name_or_path = "some/base"
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logits(model: Any) -> torch.Tensor:
    """What a model says about a few tokens."""
    with torch.no_grad():
        return model.eval()(IDS).logits


def loaded(model: Any, *folders: Path) -> Any:
    """The model with adapters merged into it by PEFT, one after the other."""
    import peft

    for folder in folders:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the second one's largest entry."""
    return float((one - other).abs().max() / other.abs().max())
