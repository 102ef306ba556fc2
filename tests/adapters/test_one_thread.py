"""Decompositions in one thread: their bits are those of one, whatever torch's setting, and the setting comes back."""

from __future__ import annotations

import pytest
import torch

from plait.adapters.one_thread import in_one_thread
from plait.merging.methods.featcal import featcal
from plait.merging.methods.regmean_pp import regmean_pp
from plait.statistics import Statistics, compress_statistics
from plait.statistics.moments import ModuleInfo, Moments
from plait.subspaces import compute_subspaces
from tests.merging.test_with_forward import Net, adapters, batches

WIDTH = 1024  # where decompositions were seen to depend on threads, and with them where `contrastive` starts


@pytest.fixture
def threads():
    """Sets torch's threads; afterwards they are what they were."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def of(task: int) -> Statistics:
    """Statistics of one wide site."""
    rows = torch.randn(2 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(task))
    rows *= torch.linspace(0.1, 3.0, WIDTH).roll(40 * task)
    moments = Moments(len(rows), rows.sum(0), rows.T @ rows)
    module = ModuleInfo("site", (8, WIDTH), 1.0)
    return Statistics({"site": moments}, {"layer": module}, {"task": str(task), "tokens": len(rows)})


def test_torch_computes_alone_and_its_setting_comes_back(threads):
    threads(2)
    assert in_one_thread(torch.get_num_threads) == 1 and torch.get_num_threads() == 2
    with pytest.raises(RuntimeError):
        in_one_thread(torch.linalg.solve, torch.zeros(2, 2), torch.ones(2))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", ["eigh", "eigvalsh", "cholesky_ex", "qr", "svd", "pinv"])
def test_decompositions_have_the_bits_of_one_thread(name, threads):
    rows = torch.randn(768, 384, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    function, matrix = getattr(torch.linalg, name), rows.T @ rows
    parts = []
    for count in (1, 2):
        threads(count)
        answer = in_one_thread(function, matrix)
        parts.append([answer] if isinstance(answer, torch.Tensor) else list(answer))
    assert all(torch.equal(x, y) for x, y in zip(*parts, strict=True))


def test_starts_have_the_bits_of_one_thread(threads):
    starts, known = [], {str(t): of(t) for t in range(3)}
    for count in (1, 2):
        threads(count)
        starts.append(compute_subspaces("contrastive", known, tasks=["0"], rank=4)["0"]["layer"].A)
    # Bit for bit where products have the same bits with any number of threads, which not all processors' do (docs/trust.md).
    assert torch.equal(*starts) or float((starts[0] - starts[1]).norm() / starts[0].norm()) < 1e-5


def test_what_decides_a_fit_or_a_smaller_file_is_decomposed_alone(threads, monkeypatch):
    seen = []

    def noted(name):
        function = getattr(torch.linalg, name)

        def note(*arguments, **options):
            seen.append((name, torch.get_num_threads()))
            return function(*arguments, **options)

        return note

    for name in ("eigh", "eigvalsh", "cholesky_ex", "qr", "svd"):
        monkeypatch.setattr(torch.linalg, name, noted(name))
    threads(2)
    net, data, pair = Net(), batches(), adapters()
    for method in (featcal, regmean_pp):
        method(pair, net, lambda t, b: net(b["x"]), data)
        assert seen and {count for _, count in seen} == {1}, method
        seen.clear()
    compress_statistics(of(0), 16)
    assert seen and {count for _, count in seen} == {1} and torch.get_num_threads() == 2
