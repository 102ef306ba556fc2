"""The laws that methods with forward passes can have: what `test_merge_laws` asks of the registered ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import InputError
from plait.merging import merge
from plait.merging.methods.adamerging import adamerging
from plait.merging.methods.featcal import featcal
from plait.merging.methods.regmean_pp import regmean_pp
from plait.merging.plan import Merged
from tests.reference.test_forward_twins import drawn

METHODS = {
    "regmean_pp": (regmean_pp, {}),
    "featcal": (featcal, {}),
    "adamerging": (adamerging, {"steps": 3, "learning_rate": 0.01}),
}


@pytest.fixture(params=sorted(METHODS))
def method(request) -> str:
    return request.param


def run(method: str, adapters: list[Adapter], net, batches, **given: Any) -> Merged:
    function, options = METHODS[method]
    done = function(adapters, net, net.logits, batches, **options, **given)
    for f in done.adapter.modules.values():
        assert f.A.dtype == f.B.dtype == torch.float32
        assert torch.isfinite(f.A).all() and torch.isfinite(f.B).all()
    return done


def assert_close(a: Merged, b: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    for m, f in a.adapter.modules.items():
        assert float((f.delta() - b[m]).abs().max()) <= tolerance * max(1e-12, float(b[m].abs().max())), m


def dense(done: Merged) -> dict[str, torch.Tensor]:
    return {m: f.delta() for m, f in done.adapter.modules.items()}


def with_factors(adapter: Adapter, change) -> Adapter:
    return Adapter(adapter.name, adapter.base, {m: change(f) for m, f in adapter.modules.items()})


def test_order_of_the_adapters_does_not_matter(method):
    net, adapters, batches, _ = drawn(1)
    assert_close(run(method, adapters, net, batches), dense(run(method, adapters[::-1], net, batches)))


def test_order_of_the_modules_does_not_matter(method):
    net, adapters, batches, _ = drawn(2)
    turned = [Adapter(a.name, a.base, dict(reversed(a.modules.items()))) for a in adapters]
    assert_close(run(method, turned, net, batches), dense(run(method, adapters, net, batches)))


def test_same_inputs_same_bits(method):
    net, adapters, batches, _ = drawn(3)
    a, b = run(method, adapters, net, batches), run(method, adapters, net, batches)
    for m, f in a.adapter.modules.items():
        assert torch.equal(f.A, b.adapter.modules[m].A) and torch.equal(f.B, b.adapter.modules[m].B)


@pytest.mark.parametrize("method", ["regmean_pp", "featcal"])
def test_one_adapter_comes_back(method):
    net, adapters, batches, _ = drawn(4)
    done = run(method, adapters[:1], net, batches)
    assert_close(done, {m: f.delta() for m, f in adapters[0].modules.items()})


def test_zero_adapters_give_zero(method):
    net, adapters, batches, _ = drawn(5)
    zero = [with_factors(a, lambda f: LoraFactors(f.A, torch.zeros_like(f.B), f.scaling)) for a in adapters]
    assert not any(d.any() for d in dense(run(method, zero, net, batches)).values())


def test_half_precision_inputs_are_merged_in_float32(method):
    net, adapters, batches, _ = drawn(6)
    halves = [with_factors(a, lambda f: LoraFactors(f.A.bfloat16(), f.B.bfloat16(), f.scaling)) for a in adapters]
    wide = [with_factors(a, lambda f: LoraFactors(f.A.float(), f.B.float(), f.scaling)) for a in halves]
    assert_close(run(method, halves, net, batches), dense(run(method, wide, net, batches)), 0.0)


def test_a_module_that_one_task_lacks(method):
    net, adapters, batches, _ = drawn(7)
    short = Adapter("t0", "base", {"layers.0.q": adapters[0].modules["layers.0.q"]})
    done = run(method, [short, *adapters[1:]], net, batches)
    assert set(done.adapter.modules) == set(adapters[1].modules) and "t0" in str(done.record.missing)


def test_infinite_factors_are_refused(method):
    net, adapters, batches, _ = drawn(8)
    bad = with_factors(adapters[0], lambda f: LoraFactors(f.A, f.B * float("inf"), f.scaling))
    with pytest.raises(InputError, match="NaN or infinity"):
        run(method, [bad, *adapters[1:]], net, batches)


def test_featcal_of_one_adapter_twice_is_that_adapter():
    net, adapters, batches, _ = drawn(9)
    twin = Adapter("twin", "base", adapters[0].modules)
    data = {"t0": batches["t0"], "twin": batches["t0"]}
    done = featcal([adapters[0], twin], net, lambda t, b: net.logits("t0", b), data, reach=1.0, scale=1.0, pull=1e-9)
    assert_close(done, {m: f.delta() for m, f in adapters[0].modules.items()})


def test_featcal_is_nearer_to_the_adapters_outputs_than_its_anchor():
    """What it is for: the last layer's outputs of the fitted model, against those of the merge that it started from."""
    net, adapters, batches, _ = drawn(10)
    start = merge(adapters, "tsv", scale=0.7).adapter
    done = featcal(adapters, net, net.logits, batches, start=start, reach=1.0, scale=1.0, pull=1e-4, rank=6)

    def error(modules) -> float:
        total = 0.0
        for a in adapters:
            for batch in batches[a.name]:
                total += float((features(net, modules, batch) - features(net, a.modules, batch)).square().sum())
        return total

    def features(net, modules, batch):
        h = batch["x"]
        for name, layer in zip(sorted(modules), net.layers, strict=True):
            h = torch.tanh(layer["q"](h) + h @ modules[name].delta().T)
        return h

    with torch.no_grad():
        assert error(done.adapter.modules) < 0.6 * error(start.modules)
