"""A fit front to back runs no block twice; a model whose blocks do not simply follow one another is noticed and run whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plait.adapters.lora import Adapter, LoraFactors
from plait.merging.methods import featcal as fitting
from plait.model.resuming import Resuming

BLOCKS, WIDTH, ROWS = 5, 6, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, h):
        self.calls += 1
        return (h + torch.tanh(self.second(torch.tanh(self.first(h)))), "beside")


class Net(nn.Module):
    """Blocks one after the other; or each is also given what the first one has put out."""

    def __init__(self, across: bool) -> None:
        super().__init__()
        self.blocks, self.across = nn.ModuleList(Block() for _ in range(BLOCKS)), across

    def forward(self, x):
        h = first = self.blocks[0](x)[0]
        for block in self.blocks[1:]:
            h = block(h + first if self.across else h)[0]
        return h


def made(across: bool):
    torch.manual_seed(0)
    net = Net(across)
    adapters, batches = [], {}
    for t in ("one", "two"):
        modules = {
            f"blocks.{i}.{layer}": LoraFactors(torch.randn(2, WIDTH), torch.randn(WIDTH, 2) * 0.3, 1.0)
            for i in range(BLOCKS)
            for layer in ("first", "second")
        }
        adapters.append(Adapter(t, "base", modules))
        batches[t] = [{"x": torch.randn(ROWS, WIDTH)} for _ in range(3)]
    return net, adapters, batches


def fit(net, adapters, batches):
    for block in net.blocks:
        block.calls = 0
    done = fitting.featcal(adapters, net, lambda _, batch: net(batch["x"]), batches)
    return {m: f.delta() for m, f in done.adapter.modules.items()}, [b.calls for b in net.blocks]


@pytest.mark.parametrize("across", [False, True])
def test_it_is_the_fit_of_whole_passes(across, monkeypatch):
    net, adapters, batches = made(across)
    resumed, calls = fit(net, adapters, batches)
    monkeypatch.setattr(fitting.Resuming, "of", classmethod(lambda cls, model, modules: cls()))
    whole, before = fit(net, adapters, batches)
    for module, delta in whole.items():
        torch.testing.assert_close(resumed[module], delta, rtol=1e-4, atol=1e-6)
    if not across:
        assert sum(calls) < 0.6 * sum(before)


def test_blocks_are_left_as_they_were():
    net, adapters, batches = made(False)
    fit(net, adapters, batches)
    assert all("forward" not in b.__dict__ and not b._forward_hooks for b in net.blocks)


def test_modules_outside_one_list_of_blocks_are_run_from_the_start():
    net = nn.ModuleDict({"a": Net(False), "b": Net(False)})
    inside = {"a.blocks.3.first": net["a"].blocks[3].first}
    assert Resuming.of(net, inside).block_of == {"a.blocks.3.first": 3}
    assert Resuming.of(net, {**inside, "b.blocks.0.first": net["b"].blocks[0].first}).blocks == ()
