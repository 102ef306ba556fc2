"""Adapters of mixtures of experts, merged: the same logits as PEFT with the same adapters."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.mixtures import FUSED, adapter, difference, loaded, logits, mixture

from plait.adapters.peft_format import read_adapter, write_adapter
from plait.errors import InputError, UsageError
from plait.merging.folders import merge_folders
from plait.merging.registry import find_method, merge_methods

MODELS = ["mixtral", "qwen3_moe", "gpt_oss"]
Q_AND_EXPERTS = {"target_modules": ["q_proj"], "target_parameters": FUSED}


def targets(name: str) -> dict:
    """PEFT's all-linear knows the experts of the first two; GPT-OSS's have to be named."""
    router = "mlp.router.weight"
    return {"target_modules": ["q_proj", "o_proj"], "target_parameters": [*FUSED, router]} if name == "gpt_oss" else {}


@pytest.mark.parametrize("name", MODELS)
def test_one_adapter_of_weight_one_comes_back(tmp_path, name):
    given = adapter(mixture(name), tmp_path / "a", 1, **targets(name))
    done = merge_folders([given], tmp_path / "m", method="task_arithmetic", scale=1.0)
    assert done.record.verification_error < 1e-6
    assert difference(logits(loaded(mixture(name), tmp_path / "m")), logits(loaded(mixture(name), given))) < 1e-6
    config = json.loads((tmp_path / "m/adapter_config.json").read_text())
    assert set(config["target_parameters"]) == set(
        json.loads((given / "adapter_config.json").read_text())["target_parameters"]
    )
    assert difference(logits(loaded(mixture(name), given)), logits(mixture(name))) > 0.01


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("other", [{}, {"r": 3}, {"use_rslora": True, "lora_alpha": 3}])
def test_two_add_up(tmp_path, name, other):
    a = adapter(mixture(name), tmp_path / "a", 1, **targets(name))
    b = adapter(mixture(name), tmp_path / "b", 2, **targets(name), **other)
    merge_folders([a, b], tmp_path / "m", method="task_arithmetic", scale=1.0)
    found, wanted = logits(loaded(mixture(name), tmp_path / "m")), logits(loaded(mixture(name), a, b))
    assert difference(found, wanted) < 1e-5


PARTNERS = {
    "attention alone": {"target_modules": ["q_proj", "v_proj"]},
    "the router alone": {"target_modules": [], "target_parameters": ["gate.weight"]},
    "one fused weight of two": {"target_modules": [], "target_parameters": ["experts.down_proj"], "r": 5},
    "experts of one layer": {"target_modules": [], "target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"]},
    "a router as a parameter of a linear layer": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "rank patterns": {**Q_AND_EXPERTS, "rank_pattern": {"gate_up_proj": 3, "layers.1.mlp.experts.down_proj": 1}},
    "alpha patterns": {**Q_AND_EXPERTS, "alpha_pattern": {"down_proj": 7, "q_proj": 1}},
}


@pytest.mark.parametrize("partner", PARTNERS)
def test_experts_beside_an_adapter_of_other_targets(tmp_path, partner):
    a = adapter(mixture("qwen3_moe"), tmp_path / "a", 1)
    b = adapter(mixture("qwen3_moe"), tmp_path / "b", 2, **PARTNERS[partner])
    for order in ([a, b], [b, a]):
        merge_folders(order, tmp_path / "m", overwrite=True, method="task_arithmetic", scale=1.0)
        found, wanted = logits(loaded(mixture("qwen3_moe"), tmp_path / "m")), logits(loaded(mixture("qwen3_moe"), a, b))
        assert difference(found, wanted) < 1e-5


def test_weights_and_a_cut_are_each_experts_own(tmp_path):
    a, b = (adapter(mixture("mixtral"), tmp_path / n, s, **Q_AND_EXPERTS) for n, s in (("a", 1), ("b", 2)))
    merge_folders([a, b], tmp_path / "m", weights=[0.5, -2.0], rank=3, method="task_arithmetic", scale=1.0)
    found, (x, y) = read_adapter(tmp_path / "m"), map(read_adapter, (a, b))
    assert {f.rank for f in found.modules.values()} == {3}
    for module, f in found.modules.items():
        summed = 0.5 * x.modules[module].delta() - 2 * y.modules[module].delta()
        U, S, V = torch.linalg.svd(summed.double())
        best = (U[:, :3] * S[:3]) @ V[:3]
        torch.testing.assert_close(f.delta().double(), best, atol=1e-5, rtol=1e-4)
    loaded(mixture("mixtral"), tmp_path / "m")


@pytest.mark.parametrize("method", sorted(merge_methods()))
def test_every_method_merges_experts_or_says_what_it_lacks(tmp_path, method):
    a, b = (adapter(mixture("mixtral", num_hidden_layers=1), tmp_path / n, s) for n, s in (("a", 1), ("b", 2)))
    if find_method(method).needs:
        with pytest.raises(UsageError):
            merge_folders([a, b], tmp_path / "m", method=method, scale=1.0)
        return
    done = merge_folders([a, b], tmp_path / "m", method=method, scale=1.0)
    assert done.record.verification_error < 1e-3
    found = logits(loaded(mixture("mixtral", num_hidden_layers=1), tmp_path / "m"))
    assert difference(found, logits(mixture("mixtral", num_hidden_layers=1))) > 1e-4
    merged, inputs = read_adapter(tmp_path / "m"), [read_adapter(p) for p in (a, b)]
    assert merged.modules.keys() == inputs[0].modules.keys()


def test_a_round_trip_keeps_every_bit(tmp_path):
    given = read_adapter(adapter(mixture("mixtral"), tmp_path / "a", 1))
    (tmp_path / "again").mkdir()
    write_adapter(tmp_path / "again", given)
    again = read_adapter(tmp_path / "again", name="a")
    assert again.modules.keys() == given.modules.keys()
    for module, f in given.modules.items():
        assert torch.equal(f.A, again.modules[module].A) and torch.equal(f.B, again.modules[module].B)
        assert f.scaling == again.modules[module].scaling and f.kind == again.modules[module].kind


def test_other_numbers_of_experts_are_other_bases(tmp_path):
    a = adapter(mixture("mixtral"), tmp_path / "a", 1, **Q_AND_EXPERTS)
    b = adapter(mixture("mixtral", num_local_experts=3), tmp_path / "b", 2, **Q_AND_EXPERTS)
    with pytest.raises(InputError, match=r"4 experts .* 3"):
        merge_folders([a, b], tmp_path / "m", method="task_arithmetic", scale=1.0)


def test_experts_one_by_one_and_fused_are_not_merged_side_by_side(tmp_path):
    a = adapter(mixture("qwen3_moe"), tmp_path / "a", 1, **Q_AND_EXPERTS)
    tensors, name = {}, "base_model.model.model.layers.0.mlp.experts"
    for e in range(4):
        tensors |= {
            f"{name}.{e}.up_proj.lora_A.weight": torch.ones(2, 16),
            f"{name}.{e}.up_proj.lora_B.weight": torch.ones(20, 2),
        }
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "b/adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "some/base",
        "r": 2,
        "task_type": "CAUSAL_LM",
        "target_modules": ["up_proj"],
    }
    (tmp_path / "b/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="one by one"):
        merge_folders([a, tmp_path / "b"], tmp_path / "m", method="task_arithmetic", scale=1.0)


def damaged(folder: Path, **changed: object) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    return folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_parameters": None}, "names none"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "2 parameters"),
        ({"target_parameters": ["experts.gate_up_proj", "experts.other"]}, "depends on the model's class"),
        ({"target_parameters": ["experts.up_proj", "experts.gate_up_proj"]}, None),
        ({"rank_pattern": {"down_proj": 3}}, "rank 3"),
        ({"target_parameters": "experts.down_proj"}, "expected a list"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, changed, message):
    folder = damaged(adapter(mixture("mixtral"), tmp_path / "a", 1, **Q_AND_EXPERTS), **changed)
    if message is None:
        read_adapter(folder)
        return
    with pytest.raises(InputError, match=message):
        read_adapter(folder)


def test_swapped_factors_are_noticed(tmp_path):
    folder = adapter(mixture("mixtral"), tmp_path / "a", 1, **Q_AND_EXPERTS)
    tensors = load_file(folder / "adapter_model.safetensors")
    inner = ".experts.base_layer."
    swapped = {
        k.replace(inner, ".experts.") if inner in k else k.replace(".experts.", inner): v for k, v in tensors.items()
    }
    save_file(swapped, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="no gate_up_proj"):
        read_adapter(folder)


def test_peft_loads_without_a_word_about_missing_keys(tmp_path):
    import peft

    a = adapter(mixture("mixtral"), tmp_path / "a", 1)
    merge_folders([a], tmp_path / "m", method="tsv", scale=1.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(mixture("mixtral"), tmp_path / "m")
    assert not [w for w in said if "missing" in str(w.message).lower()]
