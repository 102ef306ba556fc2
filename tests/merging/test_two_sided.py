"""MaTS from files: statistics with output gradients are read, files without are refused before anything is computed."""

from __future__ import annotations

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.errors import UsageError
from plait.merging import merge, merge_folders
from plait.statistics import ModuleInfo, Moments, Statistics, compress_statistics, read_statistics, write_statistics

MODULES = {"layers.0.q": (9, 7), "layers.0.v": (6, 7)}


def moments(width, generator):
    h = torch.randn(40, width, generator=generator) * torch.linspace(0.1, 3.0, width)
    return Moments(40, h.sum(0), h.T @ h)


@pytest.fixture
def files(tmp_path):
    """Folders of two adapters, and by task a statistics file with output gradients, and one without."""
    folders, whole, plain = [], {}, {}
    for seed, task in enumerate(("one", "two")):
        g = torch.Generator().manual_seed(seed)
        factors = {
            m: LoraFactors(torch.randn(2, i, generator=g), torch.randn(o, 2, generator=g), 0.5)
            for m, (o, i) in MODULES.items()
        }
        (tmp_path / task).mkdir()
        write_adapter(tmp_path / task, Adapter(task, "base", factors))
        folders.append(tmp_path / task)
        modules = {m: ModuleInfo("layers.0.q", shape, 1.0) for m, shape in MODULES.items()}
        own = Statistics({"layers.0.q": moments(7, g)}, modules, {"task": task})
        two = Statistics(own.sites, modules, own.provenance, "", {m: moments(o, g) for m, (o, _) in MODULES.items()})
        whole[task], plain[task] = tmp_path / f"{task}.stats.safetensors", tmp_path / f"{task}-plain.stats.safetensors"
        write_statistics(whole[task], two)
        write_statistics(plain[task], own)
    return folders, whole, plain


def moved(adapter, statistics):
    """The sum over modules of tr(G D M D^T)."""
    total = 0.0
    for module in MODULES:
        D = adapter.modules[module].delta()
        G, M = statistics.output_gradients_for(module).dense(), statistics.moments_for(module).dense()
        total += float((G @ D @ M @ D.T).trace())
    return total


def test_files_with_output_gradients_are_read(files, tmp_path):
    folders, whole, _ = files
    done = merge_folders(folders, tmp_path / "out", method="mats", statistics=whole)
    adapters = [read_adapter(f) for f in folders]
    known = {t: read_statistics(p) for t, p in whole.items()}
    merged, even = (merge(adapters, m, statistics=known) for m in ("mats", "regmean"))
    assert done.record.scale == merged.record.scale and "task's predictions" in merged.record.scale_reason
    plain = merge(adapters, "mats", statistics=known, scale=1.0).adapter
    ratios = [moved(plain, known[a.name]) / moved(a, known[a.name]) for a in adapters]
    # 1.3 times what moves predictions as far as the tasks' own adapters do
    assert merged.record.scale == pytest.approx(1.3 * (sum(ratios) / 2) ** -0.5, rel=0.006)
    for module, factors in read_adapter(tmp_path / "out").modules.items():
        assert factors.rank == 4
        torch.testing.assert_close(factors.delta(), merged.adapter.modules[module].delta(), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(factors.delta(), even.adapter.modules[module].delta(), rtol=0.01)
    cut = merge(adapters, "mats", statistics=known, rank=2)
    assert all(f.rank == 2 for f in cut.adapter.modules.values()) and cut.record.loss.discarded_energy > 0


def test_output_gradients_alike_for_all_tasks_are_regmean(files):
    folders, whole, _ = files
    adapters = [read_adapter(f) for f in folders]
    known = {t: read_statistics(p) for t, p in whole.items()}
    shared = known["one"].output_gradients
    alike = {t: Statistics(s.sites, s.modules, s.provenance, "", shared) for t, s in known.items()}
    one, other = (merge(adapters, m, statistics=alike, scale=1.0).adapter for m in ("mats", "regmean"))
    for module, factors in one.modules.items():
        torch.testing.assert_close(factors.delta(), other.modules[module].delta(), rtol=1e-4, atol=1e-4)


def test_files_without_are_refused_and_smaller_ones_serve(files):
    folders, whole, plain = files
    adapters = [read_adapter(f) for f in folders]
    known = {t: read_statistics(p) for t, p in whole.items()}
    small = {t: compress_statistics(s, 2) for t, s in known.items()}
    for module, factors in merge(adapters, "mats", statistics=small, scale=1.0).adapter.modules.items():
        exact = merge(adapters, "mats", statistics=known, scale=1.0).adapter.modules[module]
        assert 0 < (factors.delta() - exact.delta()).norm() < 0.5 * exact.delta().norm()
    mixed = {"one": known["one"], "two": read_statistics(plain["two"])}
    with pytest.raises(
        UsageError, match=r"needs output gradients; the statistics of 'two' hold none.*--output-gradients"
    ):
        merge(adapters, "mats", statistics=mixed)
    part = {m: g for m, g in known["two"].output_gradients.items() if m != "layers.0.v"}
    mixed["two"] = Statistics(known["two"].sites, known["two"].modules, known["two"].provenance, "", part)
    with pytest.raises(UsageError, match=r"layers.0.v.*'two' hold no output gradients for this module"):
        merge(adapters, "mats", statistics=mixed)
