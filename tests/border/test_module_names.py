"""A target names a module by whole words, as PEFT has it."""

from __future__ import annotations

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from plait.border.module_names import named_by

CASES = [
    ("q_proj", "q_proj", True),
    ("model.layers.0.self_attn.q_proj", "q_proj", True),
    ("model.layers.0.self_attn.q_proj", "self_attn.q_proj", True),
    ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
    ("model.layers.0.self_attn.my_q_proj", "q_proj", False),
    ("my_q_proj", "q_proj", False),
    ("model.layers.0.self_attn.q_proj", "attn.q_proj", False),
    ("model.layers.0.self_attn.q_proj", "self_attn", False),
    ("q_proj", "self_attn.q_proj", False),
    ("model.layers.10.mlp", "0.mlp", False),
    ("model.layers.0.self_attnxq_proj", "self_attn.q_proj", False),
    ("model.layers.0.self_attn.q_proj", ".q_proj", False),
    ("model.layers.0.self_attn.q_proj", "Q_proj", False),
]


@pytest.mark.parametrize(("module", "target", "named"), CASES)
def test_a_target_is_a_name_or_its_last_words(module, target, named):
    assert named_by(module, target) is named
    assert bool(check_target_module_exists(LoraConfig(target_modules=[target]), module)) is named
