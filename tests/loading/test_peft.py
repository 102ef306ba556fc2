"""PEFT's rules, held against PEFT: every tensor of every folder, sound or not, ends where the account says."""

from __future__ import annotations

import pytest

from plait.errors import RunError
from plait.loading import accounts, require_loadable
from tests.loading import planted
from tests.loading.planted import (
    Q0,
    ROOT,
    add,
    both,
    causal,
    change,
    classifier,
    configure,
    conv1d,
    drop,
    placed_by_peft,
    rename,
    save_adapter,
)

QV = ["q_proj", "v_proj"]
LLM = {"task_type": "CAUSAL_LM", "target_modules": QV}
TIED = {"base": lambda: causal(tied=True)}

# name -> base, config of a folder that PEFT saves.
SOUND = {
    "causal": (causal, LLM),
    "regex": (causal, {**LLM, "target_modules": r"model\.layers\.[0-1]\.self_attn\.(q|v)_proj"}),
    "all-linear": (causal, {**LLM, "target_modules": "all-linear"}),
    "patterns": (causal, {**LLM, "rank_pattern": {"layers.1.self_attn.q_proj": 4, ".*v_proj": 3}, "alpha_pattern": {"q_proj": 1}}),
    "layers": (causal, {**LLM, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": (causal, {**LLM, "target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "rslora": (causal, {**LLM, "use_rslora": True}),
    "dora": (causal, {**LLM, "use_dora": True}),
    "velora": (causal, {**LLM, "velora_config": {"num_groups": 4}}),
    "lora_bias": (classifier, {"task_type": "SEQ_CLS", "target_modules": ["query"], "lora_bias": True}),
    "embedding": (causal, {**LLM, "target_modules": [*QV, "embed_tokens"]}),
    "head of the language model": (causal, {**LLM, "target_modules": [*QV, "lm_head"]}),
    "saved whole": (causal, {**LLM, "modules_to_save": ["embed_tokens"]}),
    "saved whole, tied": (lambda: causal(tied=True), {**LLM, "modules_to_save": ["embed_tokens"]}),
    "saved whole and tied together": (
        lambda: causal(tied=True), {**LLM, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "embedding tied together": (
        lambda: causal(tied=True), {**LLM, "target_modules": [*QV, "embed_tokens"], "ensure_weight_tying": True},
    ),
    "two saved whole": (causal, {**LLM, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "norm saved whole": (causal, {**LLM, "modules_to_save": ["norm"]}),
    "trained tokens": (causal, {**LLM, "trainable_token_indices": [3, 5]}),
    "trained tokens of both": (causal, {**LLM, "trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}}),
    "biases": (classifier, {"task_type": "SEQ_CLS", "target_modules": ["query"], "bias": "all"}),
    "biases of LoRA": (classifier, {"task_type": "SEQ_CLS", "target_modules": ["query"], "bias": "lora_only"}),
    "classification": (classifier, {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    "classification, dense": (classifier, {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "classification without a type": (classifier, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "conv1d": (conv1d, {"task_type": "CAUSAL_LM", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "position embeddings": (conv1d, {"task_type": "CAUSAL_LM", "target_modules": ["wpe", "c_proj"], "fan_in_fan_out": True}),
    "a fused parameter": (causal, {"task_type": "CAUSAL_LM", "target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}),
}  # fmt: skip

SEQ_CLS = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
NORM = f"{ROOT}model.norm.weight"
# name -> base, config, the fault that is planted, a text of what is said of it.
FAULTS = {
    "half of a pair": (causal, LLM, drop(f"{Q0}.lora_B"), "has no lora_B"),
    "other half of a pair": (causal, LLM, drop(f"{Q0}.lora_A"), "has no lora_A"),
    "a module named in full": (
        causal, LLM, both(drop(Q0), configure(target_modules=[Q0, "model.layers.1.self_attn.q_proj", "v_proj"])), "has no tensors",
    ),
    "no prefix": (causal, LLM, rename(ROOT, ""), "PEFT's names start with"),
    "half a prefix": (causal, LLM, rename(ROOT, "model."), "PEFT's names start with"),
    "a compiled model": (causal, LLM, rename(ROOT, f"{ROOT}_orig_mod."), "training wrapper"),
    "a sharded model": (causal, LLM, rename(".self_attn.", "._fsdp_wrapped_module.self_attn."), "training wrapper"),
    "a prefix twice": (causal, LLM, rename(ROOT, ROOT + ROOT), "training wrapper"),
    "another adapter's name": (causal, LLM, rename(".weight", ".work.weight"), "keeps the adapter's name"),
    "overwrites the base": (causal, LLM, add(NORM, 16), "modules_to_save does not name it"),
    "overwrites the embedding": (causal, LLM, add(f"{ROOT}model.embed_tokens.weight", 40, 16), "modules_to_save does not name it"),
    "undeclared module": (causal, {**LLM, "modules_to_save": ["embed_tokens"]}, configure(modules_to_save=None), "written over the base"),
    "undeclared head": (
        classifier, {"target_modules": ["query"], "modules_to_save": ["classifier"]}, configure(modules_to_save=None), "written over",
    ),
    "weight of an adapted module": (causal, LLM, add(f"{ROOT}{Q0}.weight", 16, 16), "has factors, and its own weight"),
    "copy where nothing is adapted": (causal, LLM, add(f"{ROOT}lm_head.base_layer.weight", 40, 16), "gets no factors"),
    "module that is not targeted": (causal, LLM, configure(target_modules=["v_proj"]), "gets no factors"),
    "regex that does not reach": (causal, LLM, configure(target_modules=r"model\.layers\.1\..*_proj"), "gets no factors"),
    "excluded": (causal, LLM, configure(exclude_modules=["q_proj"]), "gets no factors"),
    "another layer": (causal, LLM, configure(layers_to_transform=[0]), "gets no factors"),
    "an adapted module that is saved whole": (
        causal, {**LLM, "modules_to_save": ["lm_head"]}, configure(modules_to_save=["lm_head", "q_proj"]), "gets no factors",
    ),
    "embedding factors on a linear module": (causal, LLM, planted.turned, "is multiplied with"),
    "linear factors on an embedding": (causal, {**LLM, "target_modules": [*QV, "embed_tokens"]}, planted.as_linear, "is an embedding"),
    "magnitudes without DoRA": (causal, {**LLM, "use_dora": True}, configure(use_dora=False), "says nothing of use_dora"),
    "tokens that are not declared": (
        causal, {**LLM, "trainable_token_indices": [3]}, configure(trainable_token_indices=None), "says nothing of trainable_token_indices",
    ),
    "empty": (causal, LLM, add(f"{ROOT}{Q0}.lora_B.weight", 0), "is empty"),
    "empty whole weight": (causal, {**LLM, "modules_to_save": ["embed_tokens"]}, add(f"{ROOT}model.embed_tokens.weight", 0), "is empty"),
    "another rank": (causal, LLM, configure(r=3), "the config says rank 3"),
    "another rank of one": (causal, LLM, configure(rank_pattern={"layers.1.self_attn.v_proj": 5}), "the config says rank 5"),
    "no head": (classifier, SEQ_CLS, drop("classifier"), "KeyError"),
    "no whole module": (causal, {**LLM, "modules_to_save": ["embed_tokens"]}, drop("embed_tokens"), "KeyError"),
    "an init of another's": (causal, LLM, configure(init_lora_weights="osrm"), "which PEFT refuses"),
}  # fmt: skip


def said(folder):
    (account,) = accounts(folder, ["peft"])
    return account


def agrees(folder, base, account):
    """Whether every tensor stands where the account says, or PEFT raised and the account says so."""
    real = placed_by_peft(folder, base)
    if isinstance(real, str):
        return any(f.raises for f in account.faults), real
    said = {p.tensor: p.parameter for p in account.placements}
    same = said.keys() == real.keys() and all(p in real[t] if p else not real[t] for t, p in said.items())
    return same and not any(f.raises for f in account.faults), real


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_folder_is_loaded_as_the_account_says(name, tmp_path):
    base, config = SOUND[name]
    folder = save_adapter(tmp_path / "adapter", base(), **config)
    account = said(folder)
    assert not account.faults
    agree, real = agrees(folder, base(), account)
    assert agree, (real, account.placements)
    assert {p.effect for p in account.placements} <= {"loaded", "replaces", "overwrites"}
    assert require_loadable(folder) == tuple(a for a in accounts(folder) if a.own)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_is_what_peft_does(name, tmp_path):
    base, config, edit, words = FAULTS[name]
    folder = change(save_adapter(tmp_path / "adapter", base(), **config), edit)
    account = said(folder)
    assert any(words in f.what for f in account.faults), account.faults
    agree, real = agrees(folder, base(), account)
    assert agree, (real, account.placements, account.faults)
    with pytest.raises(RunError, match="loaded by peft"):
        require_loadable(folder)
