"""Adapters whose experts are named as transformers 4 has them: what PEFT makes of them with transformers 5, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from plait.loading import accounts
from plait.merging.folders import merge_folders

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1,
}  # fmt: skip
ATTENTION = {"model.layers.1.self_attn.q_proj": (32, 32)}
EXPERTS = {
    f"model.layers.1.mlp.experts.{e}.{k}": s
    for e in range(4)
    for k, s in (("gate_proj", (16, 32)), ("up_proj", (16, 32)), ("down_proj", (32, 16)))
}
DENSE = {
    f"model.layers.0.mlp.{k}": s for k, s in (("gate_proj", (48, 32)), ("up_proj", (48, 32)), ("down_proj", (32, 48)))
}


def folder(path: Path, modules: dict[str, tuple[int, int]], seed: int = 1, **config: object) -> Path:
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, width) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, width, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
    save_file(tensors, path / "adapter_model.safetensors")
    targets = sorted({m.rpartition(".")[2] for m in modules})
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "moe", "r": 4, "lora_alpha": 8}
    (path / "adapter_config.json").write_text(json.dumps(fields | {"target_modules": targets} | config))
    return path


@pytest.mark.filterwarnings("ignore:Found missing adapter keys", "ignore:The following .*_pattern keys did not match")
@pytest.mark.parametrize(
    ("kind", "more", "modules", "lost"),
    [
        ("Qwen2Moe", {"shared_expert_intermediate_size": 24}, ATTENTION | EXPERTS, "experts"),
        ("Qwen3Moe", {"head_dim": 8}, ATTENTION | EXPERTS, None),
        ("Qwen3Moe", {"head_dim": 8, "mlp_only_layers": [0]}, ATTENTION | EXPERTS | DENSE, "dense"),
    ],
)
def test_what_peft_drops_is_what_is_said(tmp_path, kind, more, modules, lost):
    import peft
    import transformers as hf

    base = getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**SIZES, **more))
    path = folder(tmp_path / "a", modules)
    loaded = {n for n, p in peft.PeftModel.from_pretrained(base, path).named_parameters() if "lora_B" in n and p.any()}
    assert any(".experts." in n for n in loaded) is (lost != "experts")
    assert any("layers.0.mlp" in n for n in loaded) is (bool(DENSE.keys() & modules.keys()) and lost != "dense")
    notes = accounts(path, ["peft"])[0].notes
    assert any("as transformers 4 names them" in n and "Qwen2-MoE, drops it in silence" in n for n in notes)
    assert any("model.layers.0.mlp" in n and "it drops this in silence" in n for n in notes) is (lost == "dense")
    other = folder(tmp_path / "b", modules, seed=2)
    told = merge_folders([path, other], tmp_path / "out", "cat").record.beside
    assert {n for n in notes if "in silence" in n} <= set(told)


def test_others_hear_nothing_of_it(tmp_path):
    for name, modules in (("dense", ATTENTION | DENSE), ("attention", ATTENTION)):
        assert not any("transformers 4" in n for n in accounts(folder(tmp_path / name, modules), ["peft"])[0].notes)
    own = folder(tmp_path / "own", ATTENTION | EXPERTS, alpha_pattern={"down_proj": 16})
    assert any("experts.0.down_proj has a rank or an alpha of its own" in n for n in accounts(own, ["peft"])[0].notes)
    usual = folder(tmp_path / "usual", ATTENTION | EXPERTS, alpha_pattern={"q_proj": 16})
    assert not any("of its own" in n for n in accounts(usual, ["peft"])[0].notes)
