"""The modules that are found are those PEFT would adapt: every architecture, every kind of `target_modules`."""

from __future__ import annotations

import pytest

from plait.statistics.targets import find_targets
from tests.statistics.models import ATTENTION, build

TASK_TYPES = {"llama": "CAUSAL_LM", "qwen2": "CAUSAL_LM", "qwen3": "CAUSAL_LM", "mistral": "CAUSAL_LM"}
TASK_TYPES |= {"gemma": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "vit": None}
# Architecture -> (attention, something of the MLP, the list its layers hang on).
NAMES = {
    "bert": (["query", "value"], "output.dense", "layer"),
    "roberta": (["query", "value"], "output.dense", "layer"),
    "deberta": (["query_proj", "value_proj"], "intermediate.dense", "layer"),
    "mpnet": (["attn.q", "attn.v"], "intermediate.dense", "layer"),
    "t5": (["q", "v"], "wi", "block"),
    "llama": (["q_proj", "v_proj"], "down_proj", "layers"),
    "qwen2": (["q_proj", "v_proj"], "gate_proj", "layers"),
    "qwen3": (["q_proj", "v_proj"], "up_proj", "layers"),
    "mistral": (["q_proj", "v_proj"], "down_proj", "layers"),
    "gemma": (["q_proj", "v_proj"], "down_proj", "layers"),
    "gpt2": (["c_attn"], "mlp.c_fc", "h"),
    "vit": (["q_proj", "v_proj"], "fc1", "layers"),
}


def kinds(architecture):
    attention, other, pattern = NAMES[architecture]
    either = "|".join([*attention, other]).replace(".", r"\.")
    return {
        "list": {"target_modules": [*attention, other]},
        "one name": {"target_modules": [attention[0]]},
        "regex": {"target_modules": rf".*\.1\..*({either})"},
        "regex of whole names": {"target_modules": rf"^.*({either})$"},
        "all-linear": {"target_modules": "all-linear"},
        "all-linear but": {"target_modules": "all-linear", "exclude_modules": [other]},
        "exclude by regex": {"target_modules": [*attention, other], "exclude_modules": r".*\.0\..*"},
        "one layer": {"target_modules": attention, "layers_to_transform": 1},
        "layers of a pattern": {"target_modules": attention, "layers_to_transform": [0], "layers_pattern": pattern},
    }


@pytest.mark.parametrize("kind", kinds("llama"))
@pytest.mark.parametrize("architecture", ATTENTION)
def test_as_peft_chooses(architecture, kind):
    from peft import LoraConfig, get_peft_model

    options = kinds(architecture)[kind]
    model = build(architecture)
    mine, prefix = find_targets(model, **options)
    conv = architecture == "gpt2"
    config = LoraConfig(**options, task_type=TASK_TYPES.get(architecture, "SEQ_CLS"), fan_in_fan_out=conv)
    if architecture == "vit" and "all-linear" in kind:
        config.modules_to_save = ["classifier"]  # PEFT has no task type for images; a head is not adapted either
        config.exclude_modules = [*(config.exclude_modules or []), "classifier"]
    wrapped = get_peft_model(model, config)
    theirs = [n.removeprefix("base_model.model.") for n, m in wrapped.named_modules() if hasattr(m, "lora_A")]
    assert theirs and [f"{prefix}.{n}" if prefix and f"{prefix}.{n}" in theirs else n for n in mine] == theirs
    # A model that carries the layers already tells them by itself.
    assert list(find_targets(wrapped, None)[0]) == list(mine)
