"""Statistics and starts for mixtures of experts: dense layers and routers; experts are refused by name."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from plait.adapters.peft_format import read_adapter, write_adapter
from plait.errors import UsageError
from plait.statistics import collect_statistics
from plait.statistics.files import read_statistics, write_statistics
from plait.subspaces.compute import compute_subspaces
from plait.subspaces.live import initialize_lora_weights, subspace_state_dict
from plait.subspaces.start import initial_adapter
from tests.mixtures import IDS, difference, logits, mixture

MASK = torch.ones_like(IDS)
MASK[0, 7:] = 0
BATCH = {"input_ids": IDS, "attention_mask": MASK}
ROUTERS = {"mixtral": "mlp.gate", "qwen3_moe": "mlp.gate", "gpt_oss": "mlp.router"}


def seen(model: Any, module: nn.Module) -> torch.Tensor:
    """Real tokens of what a module was called with."""
    kept: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _m, args: kept.append(args[0].detach()))
    with torch.no_grad():
        model(**BATCH)
    handle.remove()
    return kept[0].reshape(-1, kept[0].shape[-1])[MASK.flatten().bool()]


@pytest.mark.parametrize("name", ROUTERS)
def test_all_linear_takes_routers_and_leaves_experts(name):
    model = mixture(name)
    found = collect_statistics(model, [BATCH], "all-linear")
    ends = {m.partition(".")[2].partition(".")[2] for m in found.modules}
    assert ends == {*(f"self_attn.{x}_proj" for x in "qkvo"), ROUTERS[name]}
    for layer in range(2):
        module = f"layers.{layer}.{ROUTERS[name]}"
        router = model.model.get_submodule(module)
        H = seen(model, router)
        torch.testing.assert_close(found.moments_for(module).dense(), H.T @ H, rtol=2e-5, atol=2e-5)
        energy = float((H @ router.weight.detach().T).square().sum())
        assert found.modules[module].output_energy == pytest.approx(energy, rel=1e-5)
        assert found.modules[module].is_router


def test_a_file_keeps_which_are_routers(tmp_path):
    found = collect_statistics(mixture("mixtral"), [BATCH], "all-linear", provenance={"task": "t"})
    write_statistics(tmp_path / "t.stats.safetensors", found)
    again = read_statistics(tmp_path / "t.stats.safetensors")
    assert {m for m, i in again.modules.items() if i.is_router} == {"layers.0.mlp.gate", "layers.1.mlp.gate"}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate", "router"]])
def test_a_start_is_a_folder_that_peft_trains(tmp_path, name, targets):
    import peft

    if isinstance(targets, list):
        targets = ["q_proj", ROUTERS[name].partition(".")[2]]
    pool = {
        t: collect_statistics(mixture(name), [{"input_ids": (IDS + s) % 60 + 3}], targets)
        for t, s in (("a", 0), ("b", 7))
    }
    found = compute_subspaces("contrastive", pool, rank=2)
    start = initial_adapter(
        "a",
        "some/base",
        found["a"],
        pool["a"].modules,
        alpha=4,
        task_type="CAUSAL_LM",
        target_modules=targets,
        prefix="model",
    )
    (tmp_path / "a").mkdir()
    write_adapter(tmp_path / "a", start)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (
        all(p.endswith(f"{ROUTERS[name]}.weight") for p in config["target_parameters"])
        and len(config["target_parameters"]) == 2
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(mixture(name), tmp_path / "a", is_trainable=True)
    assert not [w for w in said if "missing" in str(w.message).lower()]
    assert difference(logits(model), logits(mixture(name))) < 1e-6
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(start.modules)
    assert read_adapter(tmp_path / "a").modules.keys() == {f"model.{m}" for m in start.modules}


def test_peft_models_are_started_in_place():
    import peft

    config = {"r": 2, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(mixture("mixtral"), peft.LoraConfig(target_modules=["q_proj", "gate"], **config))
    pool = [collect_statistics(model, [{"input_ids": (IDS + s) % 60 + 3}]) for s in (0, 7)]
    starts = subspace_state_dict("contrastive", pool[0], pool[1:], rank=2)
    assert {m.rpartition(".")[2] for m in starts} == {"q_proj", "gate"}
    initialize_lora_weights(model, starts)
    state = peft.get_peft_model_state_dict(model)
    for module, A in starts.items():
        assert torch.equal(state[f"base_model.model.model.{module}.lora_A.weight"], A)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        everything = peft.get_peft_model(mixture("mixtral"), peft.LoraConfig(target_modules="all-linear", **config))
    with pytest.raises(UsageError, match="fused experts"):
        collect_statistics(everything, [BATCH])
    with pytest.raises(UsageError, match="fused experts"):
        initialize_lora_weights(everything, starts)


@pytest.mark.parametrize("target", ["experts", "down_proj", "gate_up_proj"])
def test_experts_are_refused_by_name(target):
    with pytest.raises(UsageError, match="fused"):
        collect_statistics(mixture("qwen3_moe"), [BATCH], ["q_proj", target])


class Turned(nn.Module):
    """A matrix of its own that is applied the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_a_matrix_that_is_no_linear_layers_is_refused():
    model = mixture("mixtral")
    model.model.layers[0].self_attn.q_proj = Turned()
    with pytest.raises(UsageError, match="does not apply its matrix"):
        collect_statistics(model, [BATCH], ["layers.0.self_attn.q_proj"])
