"""Every method on every kind of module: what a dense rule gives for a convolution or an embedding keeps that kind on disk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.reference import merging as twins
from torch import nn

from plait.adapters.lora import LINEAR
from plait.adapters.peft_format import read_adapter
from plait.errors import PlaitError
from plait.merging import merge, merge_methods
from plait.merging.folders import merge_folders

TARGETS = ["words", "wide", "long", "last"]
WITHOUT_STATISTICS = [name for name, method in merge_methods().items() if not method.needs]
SPACES = [
    (name, space)
    for name in WITHOUT_STATISTICS
    if "space" in merge_methods()[name].options
    for space in ("core", "knots")
]


class Net(nn.Module):
    """An embedding, convolutions of two and of one dimension, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 6)
        self.wide = nn.Conv2d(3, 8, 3)
        self.long = nn.Conv1d(5, 7, 2)
        self.last = nn.Linear(9, 4)


def trained(folder, seed: int, rank: int = 2):
    model = get_peft_model(Net(), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    model.peft_config["default"].base_model_name_or_path = "org/net"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return [trained(root / "a", 1), trained(root / "b", 2, 3)]


def deltas_by_peft(folder) -> dict[str, torch.Tensor]:
    """Each module's update as PEFT adds it to the weight, as a matrix; a dropped tensor would leave a zero or a random one."""
    model = PeftModel.from_pretrained(Net(), folder)
    layers = {name: getattr(model.base_model.model, name) for name in TARGETS}
    return {name: layer.get_delta_weight("default").detach().double().flatten(1) for name, layer in layers.items()}


def as_linear(adapter):
    return replace(adapter, modules={m: replace(f, kind=LINEAR) for m, f in adapter.modules.items()}, source={})


@pytest.mark.parametrize(("method", "space"), [(m, None) for m in WITHOUT_STATISTICS] + SPACES)
@pytest.mark.parametrize("rank", [None, 2])
def test_peft_sees_what_the_method_gives_for_plain_matrices(method, space, rank, pair, tmp_path):
    options = {"space": space} if space else {}
    merge_folders(pair, tmp_path / "m", method=method, options=options, rank=rank, scale=1.0)
    kinds = {m: f.kind for m, f in read_adapter(tmp_path / "m").modules.items()}
    assert kinds == {"words": "embedding", "wide": "conv:3x3", "long": "conv:2", "last": "linear"}
    matrices = merge(
        [as_linear(read_adapter(p)) for p in pair], method, options=options, rank=rank, scale=1.0
    ).adapter.modules
    found = deltas_by_peft(tmp_path / "m")
    for name, factors in matrices.items():
        wanted = factors.delta(torch.float64)
        wanted = wanted.T if name == "words" else wanted
        assert float((found[name] - wanted).norm() / wanted.norm().clamp(min=1e-12)) < 1e-5, name


@pytest.mark.parametrize(
    ("method", "options", "twin"),
    [
        ("ties", {"density": 0.3, "scope": "module"}, lambda D: twins.ties(D, [1, 1], 0.3)),
        ("breadcrumbs", {"density": 0.5, "gamma": 0.1}, lambda D: twins.breadcrumbs(D, [1, 1], 0.5, 0.1)),
        ("sce", {"density": 0.3}, lambda D: twins.sce(D, [1, 1], 0.3)),
        ("emr", {}, lambda D: twins.emr(D, [1, 1])),
        ("task_arithmetic", {}, lambda D: D[0] + D[1]),
    ],
)
def test_dense_rules_are_the_papers_on_peft_s_own_deltas(method, options, twin, pair, tmp_path):
    merge_folders(
        pair, tmp_path / "m", method=method, options=options, rank=64, scale=1.0
    )  # more than any module has: no cut
    inputs, found = [deltas_by_peft(p) for p in pair], deltas_by_peft(tmp_path / "m")
    for name in TARGETS:
        wanted = twin([each[name].numpy() for each in inputs])
        np.testing.assert_allclose(found[name].numpy(), wanted, atol=2e-5 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("method", ["sce", "emr", "ties", "task_arithmetic", "dare_ties"])
def test_a_module_of_one_adapter_whose_weight_is_0(method, pair, tmp_path):
    first, second = (read_adapter(p) for p in pair)
    alone = replace(second, modules={m: f for m, f in second.modules.items() if m != "words"})
    done = merge([first, alone], method, weights=[0.0, 1.0], scale=1.0).adapter
    assert float(done.modules["words"].delta().norm()) == 0 and done.modules["words"].kind == "embedding"


def test_methods_that_need_statistics_say_so_at_once(pair, tmp_path):
    for name in set(merge_methods()) - set(WITHOUT_STATISTICS):
        with pytest.raises(PlaitError, match=f"{name} needs"):
            merge_folders(pair, tmp_path / "m", method=name, scale=1.0)
        assert not (tmp_path / "m").exists()
