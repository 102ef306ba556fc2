"""Devices: a CPU without bfloat16 instructions is told of before hours are spent, and one that is not there at once."""

from __future__ import annotations

import pytest
import torch

from plait.errors import EnvironmentFault, UsageError
from plait.model.base import BaseModel, device_named, emulated
from plait.model.devices import free_memory


@pytest.mark.parametrize(
    ("level", "dtype", "told"),
    [
        ("AVX2", "bfloat16", True),
        ("AVX2", "float32", False),
        ("AVX512", "bfloat16", False),
        ("DEFAULT", "bfloat16", False),
    ],
)
def test_told_where_it_is_slow(monkeypatch, level, dtype, told):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    found = emulated(BaseModel("x", dtype=dtype, device="cpu"))
    assert (found is not None) == told
    assert not told or ("base.dtype=float32" in found and level in found)


@pytest.mark.parametrize(
    ("name", "error"), [("cuda", EnvironmentFault), ("cuda:1", EnvironmentFault), ("tpu", UsageError)]
)
def test_51_devices_that_are_not_there(monkeypatch, name, error):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error) as raised:
        device_named(name)
    assert "cpu" in raised.value.hint and name in str(raised.value)


@pytest.mark.parametrize(("share", "expected"), [(1.0, 120), (0.4, 70), (0.04, 0)])
def test_free_memory_lies_within_the_share_of_this_process(monkeypatch, share, expected):
    numbers = {"memory_reserved": 30, "memory_allocated": 10}
    for name, value in {**numbers, "mem_get_info": (100, 200)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)

    def share_of(device):
        """As torch has it: a GPU without a number is refused, though all its neighbours take one."""
        assert (device if isinstance(device, int) else device.index) == 1
        return share

    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", share_of)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for device in ("cuda", "cuda:1"):  # what is free or held for later; or the share less what is used
        assert free_memory(torch.device(device)) == expected
