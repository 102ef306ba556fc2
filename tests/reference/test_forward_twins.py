"""The methods with forward passes against their float64 twins on random networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from plait.adapters.lora import Adapter, LoraFactors
from plait.merging import merge
from plait.merging.methods.adamerging import adamerging
from plait.merging.methods.featcal import featcal
from plait.merging.methods.regmean_pp import regmean_pp
from tests.reference import forward as twin


class Net(nn.Module):
    """Tanh layers and a head for every task."""

    def __init__(self, seed: int, depth: int, tasks: tuple[str, ...], width: int = 6):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(width, width)}) for _ in range(depth)])
        self.heads = nn.ModuleDict({t: nn.Linear(width, 3) for t in tasks})

    def logits(self, task, batch):
        h = batch["x"]
        for layer in self.layers:
            h = torch.tanh(layer["q"](h))
        return self.heads[task](h)

    def arrays(self):
        pair = lambda m: (m.weight.detach().double().numpy(), m.bias.detach().double().numpy())  # noqa: E731
        return [pair(layer["q"]) for layer in self.layers], [pair(h) for h in self.heads.values()]


def drawn(seed: int, tasks: int = 3, depth: int = 3):
    names = tuple(f"t{i}" for i in range(tasks))
    g = torch.Generator().manual_seed(seed)
    adapters = []
    for i, name in enumerate(names):
        modules = {
            f"layers.{k}.q": LoraFactors(torch.randn(1 + i, 6, generator=g), torch.randn(6, 1 + i, generator=g), 0.4)
            for k in range(depth)
        }
        adapters.append(Adapter(name, "base", modules))
    batches = {n: [{"x": torch.randn(8, 6, generator=g)} for _ in range(2)] for n in names}
    deltas = [[f.delta(torch.float64).numpy() for f in a.modules.values()] for a in adapters]
    return Net(seed, depth, names), adapters, batches, deltas


def rows(batches):
    return [[b["x"].double().numpy() for b in stream] for stream in batches.values()]


@pytest.mark.parametrize("seed", range(20))
def test_regmean_pp_equals_its_twin(seed):
    net, adapters, batches, deltas = drawn(seed)
    batches = {
        n: [first, {"x": second["x"][: 3 + seed % 5]}] for n, (first, second) in batches.items()
    }  # the last is short
    weights = [0.5, 1.0, 2.0]
    done = regmean_pp(adapters, net, net.logits, batches, alpha=0.8, weights=weights)
    wanted = twin.regmean_pp(net.arrays()[0], deltas, [np.concatenate(x) for x in rows(batches)], weights, 0.8)
    for f, expected in zip(done.adapter.modules.values(), wanted, strict=True):
        assert np.abs(f.delta(torch.float64).numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("own", "rank"), [(1.0, None), (0.4, 3), (0.0, 2)])
@pytest.mark.parametrize("seed", range(5))
def test_featcal_equals_its_twin(seed, own, rank):
    net, adapters, batches, deltas = drawn(seed)
    weights = [0.5, 1.0, 2.0]
    start = merge(adapters, "tsv", weights=weights, scale=0.7).adapter
    done = featcal(
        adapters,
        net,
        net.logits,
        batches,
        start=start,
        own=own,
        pull=0.02,
        reach=1.5,
        scale=1.2,
        rank=rank,
        weights=weights,
    )
    anchor = [1.5 * f.delta(torch.float64).numpy() for f in start.modules.values()]
    inputs = [np.concatenate(x) for x in rows(batches)]
    wanted = twin.featcal(net.arrays()[0], deltas, anchor, inputs, weights, own, 0.02, [rank or 6] * 3)
    for f, expected in zip(done.adapter.modules.values(), wanted, strict=True):
        assert f.rank == (rank or 6)
        assert np.abs(f.delta(torch.float64).numpy() - 1.2 * expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_adamerging_equals_its_twin(seed, layerwise):
    net, adapters, batches, deltas = drawn(seed, tasks=2, depth=2)
    done = adamerging(adapters, net, net.logits, batches, learning_rate=0.02, steps=8, layerwise=layerwise)
    layers, heads = net.arrays()
    wanted = twin.adamerging(layers, heads, deltas, rows(batches), 0.3, 0.02, 8, layerwise)
    learnt = done.record.options["weights"]
    found = np.array([list(learnt[a.name].values()) for a in adapters])
    assert np.abs(found - 0.3).max() > 0.02  # it moved
    assert np.abs(found - wanted).max() <= 1e-4
