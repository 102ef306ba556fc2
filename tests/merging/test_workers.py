"""Modules side by side: the order, the bits, and torch's setting afterwards."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.merging import merge
from plait.merging.workers import one_by_one, side_by_side


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_come_in_order_and_the_setting_comes_back(threads):
    threads(3)
    turn = sys.getswitchinterval()
    found = side_by_side(
        lambda i: (i, torch.get_num_threads(), sys.getswitchinterval() < turn), range(20), torch.device("cpu")
    )
    assert found == [(i, 1, True) for i in range(20)] and torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda i: 1 / i, [1, 0], torch.device("cpu"))
    assert torch.get_num_threads() == 3 and sys.getswitchinterval() == turn


def test_one_module_is_computed_alone_too(threads):
    threads(3)
    assert side_by_side(lambda i: torch.get_num_threads(), [0], torch.device("cpu")) == [1]
    threads(1)
    assert side_by_side(lambda i: torch.get_num_threads(), [0, 1], torch.device("cpu")) == [1, 1]


def test_one_by_one_stays_in_this_thread_and_the_setting_comes_back(threads):
    threads(3)
    here = threading.get_ident()
    found = one_by_one(lambda i: (i, torch.get_num_threads(), threading.get_ident() == here), range(5))
    assert found == [(i, 1, True) for i in range(5)] and torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError):
        one_by_one(lambda i: 1 / i, [1, 0])
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("modules", [1, 5])
@pytest.mark.parametrize("method", ["task_arithmetic", "tsv", "ties", "dare_linear", "core_space"])
def test_bits_do_not_depend_on_the_number_of_threads(threads, method, modules):
    adapters = []
    for i in range(3):
        g = torch.Generator().manual_seed(i)
        one = lambda: LoraFactors(torch.randn(8, 1024, generator=g), torch.randn(1024, 8, generator=g))  # noqa: B023, E731
        adapters.append(Adapter(f"t{i}", "base", {f"l.{k}.q": one() for k in range(modules)}))
    done = []
    for count in (1, 2, 4):
        threads(count)
        done.append(merge(adapters, method, verify=False, scale=1.0).adapter.modules)
    for module, f in done[0].items():
        assert all(torch.equal(f.A, d[module].A) and torch.equal(f.B, d[module].B) for d in done[1:])
