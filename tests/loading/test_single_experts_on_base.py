"""`plait check --base` of adapters whose experts are named one by one, as transformers 4 has them, on bases that fuse them."""

from __future__ import annotations

import pytest
import torch

from plait.checking.on_base import compare_on_base
from plait.errors import InputError
from tests.loading.test_single_experts import ATTENTION, DENSE, EXPERTS, SIZES, folder

SHAPES = {"w1": (16, 32), "w3": (16, 32), "w2": (32, 16)}
MIXTRAL = {f"model.layers.1.block_sparse_moe.experts.{e}.{k}": s for e in range(4) for k, s in SHAPES.items()}
ROUTER = {"model.layers.1.block_sparse_moe.gate": (4, 32)}
MIXTRAL_SIZES = {"num_local_experts": 4, "intermediate_size": 16}


def in_both_layers(modules):
    return {m.replace("layers.1", f"layers.{i}"): shape for m, shape in modules.items() for i in (0, 1)}


def saved_base(path, kind, sizes):
    import transformers as hf

    torch.manual_seed(0)
    getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**SIZES | sizes)).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "sizes", "modules"),
    [
        ("Qwen3Moe", {"head_dim": 8}, in_both_layers(ATTENTION | EXPERTS)),
        ("Mixtral", MIXTRAL_SIZES, in_both_layers(ATTENTION | MIXTRAL | ROUTER)),
    ],
)
def test_what_peft_takes_over_is_sound(tmp_path, kind, sizes, modules):
    base = saved_base(tmp_path / "base", kind, sizes)
    result = compare_on_base(folder(tmp_path / "a", modules), base)
    assert not result.faults and result.effect > 0.1 and result.error < 1e-5


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("kind", "sizes", "modules", "lost"),
    [
        ("Qwen2Moe", {"shared_expert_intermediate_size": 24}, in_both_layers(ATTENTION | EXPERTS), "experts"),
        ("Qwen3Moe", {"head_dim": 8, "mlp_only_layers": [0]}, in_both_layers(ATTENTION) | EXPERTS | DENSE, "0.mlp.down"),
    ],
)  # fmt: skip
def test_what_peft_drops_is_told(tmp_path, kind, sizes, modules, lost):
    base = saved_base(tmp_path / "base", kind, sizes)
    faults = compare_on_base(folder(tmp_path / "a", modules), base).faults
    assert any(f.startswith("PEFT drops") and lost in f for f in faults)
    assert "is off by" in faults[-1] and not any("the base has no module" in f for f in faults)


def test_modules_that_no_base_has_stay_a_fault(tmp_path):
    base = saved_base(tmp_path / "base", "Mixtral", MIXTRAL_SIZES)
    modules = in_both_layers(ATTENTION) | {"model.layers.9.block_sparse_moe.experts.0.w2": (32, 16)}
    faults = compare_on_base(folder(tmp_path / "a", modules), base).faults
    assert any("the base has no module for model.layers.9" in f for f in faults)


def test_what_peft_refuses_is_said_in_its_words(tmp_path):
    base = saved_base(tmp_path / "base", "Mixtral", MIXTRAL_SIZES)
    modules = in_both_layers({m: s for m, s in MIXTRAL.items() if m.endswith("w3")})
    with pytest.raises(InputError, match="PEFT refuses it"):
        compare_on_base(folder(tmp_path / "a", modules), base)
