"""The two methods that need forward passes, on a small network whose answers can be computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import UsageError
from plait.merging import merge
from plait.merging.methods.adamerging import adamerging
from plait.merging.methods.regmean_pp import regmean_pp
from plait.statistics.moments import Moments


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 6)}) for _ in range(2)])
        self.heads = nn.ModuleDict({t: nn.Linear(6, 3) for t in ("a", "b")})

    def forward(self, h):
        for layer in self.layers:
            h = torch.tanh(layer["q"](h))
        return h


def adapters(names=("a", "b")):
    out = []
    for i, n in enumerate(names):
        g = torch.Generator().manual_seed(i)
        f = lambda: LoraFactors(torch.randn(2, 6, generator=g), torch.randn(6, 2, generator=g), 0.5)  # noqa: B023, E731
        out.append(Adapter(n, "base", {"layers.0.q": f(), "layers.1.q": f()}))
    return out


def batches():
    g = torch.Generator().manual_seed(9)
    return {t: [{"x": torch.randn(5, 6, generator=g)} for _ in range(3)] for t in ("a", "b")}


def test_adamerging_lowers_the_entropy_and_learns_per_module():
    net, data = Net(), {t: b[:1] for t, b in batches().items()}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    done = adamerging(adapters(), net, lambda t, b: net.heads[t](net(b["x"])), data, learning_rate=0.05, steps=60)
    assert done.record.last_loss < 0.985 * done.record.first_loss
    learnt = done.record.options["weights"]
    assert learnt["a"]["layers.0.q"] != pytest.approx(learnt["a"]["layers.1.q"], abs=1e-3)
    for m, f in done.adapter.modules.items():
        wanted = sum(learnt[a.name][m] * a.modules[m].delta() for a in adapters())
        torch.testing.assert_close(f.delta(), wanted, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_adamerging_without_steps_is_task_arithmetic():
    net = Net()
    done = adamerging(adapters(), net, lambda t, b: net(b["x"]), batches(), steps=0, layerwise=False)
    other = merge(adapters(), scale=0.3, method="task_arithmetic")
    for m, f in done.adapter.modules.items():
        torch.testing.assert_close(f.delta(), other.adapter.modules[m].delta())


@pytest.mark.parametrize("clamp", [True, False])
def test_adamerging_uses_weights_between_0_and_1_as_the_authors_do(clamp):
    """At this rate they leave it: clamped they are used at its ends."""
    net = Net()
    done = adamerging(
        adapters(), net, lambda t, b: net.heads[t](net(b["x"])), batches(), learning_rate=0.2, steps=30, clamp=clamp
    )
    learnt = torch.tensor([list(w.values()) for w in done.record.options["weights"].values()])
    outside = bool(((learnt < 0) | (learnt > 1)).any())
    assert outside != clamp
    if clamp:
        assert bool(((learnt == 0) | (learnt == 1)).any())


def test_regmean_pp_is_regmean_in_the_first_block_and_sees_merged_inputs_in_the_second():
    net, data, ads = Net(), batches(), adapters()
    done = regmean_pp(ads, net, lambda t, b: net(b["x"]), data)

    class First:
        def __init__(self, rows):
            self.rows = rows

        def moments_for(self, _):
            return Moments(len(self.rows), self.rows.sum(0), self.rows.T @ self.rows)

    inputs = {t: torch.cat([b["x"] for b in data[t]]) for t in data}
    plain = merge(ads, "regmean", statistics={t: First(x) for t, x in inputs.items()}, scale=1.0)
    first = done.adapter.modules["layers.0.q"].delta()
    torch.testing.assert_close(first, plain.adapter.modules["layers.0.q"].delta(), atol=1e-5, rtol=1e-4)
    layer = net.layers[0]["q"]
    through = {t: torch.tanh(layer(x) + x @ first.T).detach() for t, x in inputs.items()}
    second = merge(ads, "regmean", statistics={t: First(x) for t, x in through.items()}, scale=1.0)
    found, wanted = done.adapter.modules["layers.1.q"].delta(), second.adapter.modules["layers.1.q"].delta()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, plain.adapter.modules["layers.1.q"].delta(), atol=1e-3)


def test_mistakes_are_named():
    net = Net()
    with pytest.raises(UsageError, match="no batches for b"):
        regmean_pp(adapters(), net, lambda t, b: net(b["x"]), {"a": batches()["a"]})
    with pytest.raises(UsageError, match="0 modules"):
        adamerging(adapters(), nn.Linear(2, 2), lambda t, b: b, batches())
    with pytest.raises(UsageError, match="never ran"):
        regmean_pp(adapters(), net, lambda t, b: None, batches())
