"""CUDA gives what the CPU gives, within float32."""

from __future__ import annotations

import pytest
import torch
from tests.laws.test_merge_laws import LAWS, statistics

from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import EnvironmentFault
from plait.merging import merge, merge_methods

MODULES = {"layers.0.q": (192, 128), "layers.0.v": (64, 128)}


def adapters(count: int) -> list[Adapter]:
    made = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        factors = {
            m: LoraFactors(torch.randn(8, w, generator=g), torch.randn(o, 8, generator=g))
            for m, (o, w) in MODULES.items()
        }
        made.append(Adapter(f"task{i}", "base", factors))
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_the_error_says_so():
    with pytest.raises(EnvironmentFault, match="no GPU that torch can use"):
        merge(adapters(2), device="cuda", method="task_arithmetic", scale=1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", sorted(merge_methods()))
def test_cuda_agrees_with_the_cpu(method):
    given = adapters(LAWS[method].tasks)
    found, wanted = (merge(given, method, statistics=statistics(given), device=d, scale=1.0) for d in ("cuda", "cpu"))
    assert found.record.verification_error < 1e-4
    losses = [r.record.loss.discarded_energy for r in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    for m, f in wanted.adapter.modules.items():
        other = found.adapter.modules[m]
        assert other.A.device.type == "cpu"
        size = float(f.delta().norm())
        assert float((f.delta() - other.delta()).norm()) <= 1e-3 * size, m
