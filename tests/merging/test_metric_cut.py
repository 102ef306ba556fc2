"""`--rank` with statistics: cut in the metric of the tasks' inputs, said and recorded; without them nothing changes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tests.reference.merging import cut_in_metric

from plait.adapters.lora import Adapter, LoraFactors, truncated
from plait.adapters.peft_format import write_adapter
from plait.cli import main
from plait.errors import UsageError
from plait.merging import merge, merge_folders, merge_methods, rank_curve
from plait.merging.record import IN_THE_METRIC
from plait.statistics.files import write_statistics
from plait.statistics.moments import ModuleInfo, Moments, Statistics

NAMES = "abc"
# Wider than high and higher than wide: a dense update is cut on its shorter side.
SHAPES = {"l.0.q": (9, 12), "l.0.v": (14, 8)}
WITHOUT_NEEDS = sorted(m for m, found in merge_methods().items() if not found.needs and not found.cuts_by)


def adapter(name: str, seed: int, rank: int = 3) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    modules = {
        m: LoraFactors(torch.randn(rank, width, generator=g), torch.randn(out, rank, generator=g), 0.5)
        for m, (out, width) in SHAPES.items()
    }
    return Adapter(name, "base", modules)


def moments(seed: int, scale: float = 1.0, modules=tuple(SHAPES)) -> Statistics:
    """Inputs with a few strong directions; another seed, others."""
    g = torch.Generator().manual_seed(100 + seed)
    sites, infos = {}, {}
    for m in modules:
        out, width = SHAPES[m]
        H = (
            scale
            * torch.randn(40, width, generator=g)
            * torch.logspace(0, -2, width)[torch.randperm(width, generator=g)]
        )
        sites[m], infos[m] = Moments(40, H.sum(0), H.T @ H), ModuleInfo(m, (out, width), 1.0)
    return Statistics(sites, infos)


def trio() -> tuple[list[Adapter], dict[str, Statistics]]:
    return [adapter(n, i) for i, n in enumerate(NAMES)], {n: moments(i) for i, n in enumerate(NAMES)}


def seconds(statistics, module):
    return [s.moments_for(module).dense().double() for s in statistics.values()]


def twin(D, S, rank):
    best, lost = cut_in_metric(D.numpy(), [s.numpy() for s in S], rank)
    return torch.from_numpy(best), float(lost)


def error(D, cut, S) -> float:
    off = D - cut.delta(torch.float64)
    return sum(float(((off @ s) * off).sum() / s.trace()) for s in S)


def whole(adapters, statistics, method):
    """The update before the cut: of a dense one at a rank that leaves nothing out."""
    return merge(adapters, method, scale=1.0, rank=99).adapter.modules


@pytest.mark.parametrize("method", WITHOUT_NEEDS)
def test_every_method_is_cut_so_that_outputs_stay_nearest(method):
    """The twin's optimum, and never further off than the cut of weights; more than rounding closer at every module."""
    adapters, statistics = trio()
    adapters = adapters[: 2 if method == "slerp" else 3]
    exact = whole(adapters, statistics, method)
    ours = merge(adapters, method, scale=1.0, rank=2, statistics=statistics)
    plain = merge(adapters, method, scale=1.0, rank=2)
    used = {a.name: statistics[a.name] for a in adapters}
    lost = total = 0.0
    for m, f in ours.adapter.modules.items():
        D, S = exact[m].delta(torch.float64), seconds(used, m)
        best, gone = twin(D, S, 2)
        assert f.rank == 2
        assert error(D, f, S) <= error(D, plain.adapter.modules[m], S) * (1 + 1e-6)
        torch.testing.assert_close(f.delta(torch.float64), best, atol=2e-5 * float(D.norm()), rtol=0)
        size = sum(float(((D @ s) * D).sum() / s.trace()) for s in S)
        assert error(D, f, S) == pytest.approx(gone * size, rel=1e-3, abs=1e-9 * size)
        lost, total = lost + gone * size, total + size
    assert ours.record.cut == IN_THE_METRIC and plain.record.cut is None
    assert ours.record.loss.discarded_energy == pytest.approx(lost / total, rel=1e-3, abs=1e-7)
    assert ours.record.verification_error < 1e-4


def test_the_cut_is_much_closer_where_inputs_have_few_directions():
    adapters, statistics = trio()
    exact = whole(adapters, statistics, "task_arithmetic")
    ours = merge(adapters, "task_arithmetic", scale=1.0, rank=2, statistics=statistics).adapter.modules
    plain = merge(adapters, "task_arithmetic", scale=1.0, rank=2).adapter.modules
    for m, f in exact.items():
        D, S = f.delta(torch.float64), seconds(statistics, m)
        assert error(D, ours[m], S) < 0.8 * error(D, plain[m], S)


def test_a_task_with_more_tokens_counts_no_more():
    adapters, statistics = trio()
    one = merge(adapters, "tsv", scale=1.0, rank=2, statistics=statistics)
    more = {**statistics, "a": moments(0, scale=30.0)}
    other = merge(adapters, "tsv", scale=1.0, rank=2, statistics=more)
    for m, f in one.adapter.modules.items():
        torch.testing.assert_close(other.adapter.modules[m].delta(), f.delta(), atol=1e-4, rtol=1e-4)


def test_the_order_of_adapters_changes_nothing_and_a_task_of_weight_0_does_not_count():
    adapters, statistics = trio()
    one = merge(adapters, "tsv", scale=1.0, rank=2, statistics=statistics).adapter.modules
    turned = merge(adapters[::-1], "tsv", scale=1.0, rank=2, statistics=statistics).adapter.modules
    assert all(torch.equal(one[m].A, turned[m].A) and torch.equal(one[m].B, turned[m].B) for m in one)
    weights = [1.0, 1.0, 0.0]
    two = merge(adapters, "task_arithmetic", scale=1.0, rank=2, weights=weights, statistics=statistics)
    less = {n: statistics[n] for n in "ab"}
    same = merge(adapters, "task_arithmetic", scale=1.0, rank=2, weights=weights, statistics=less)
    assert two.record.cut == same.record.cut == IN_THE_METRIC
    assert all(torch.equal(f.A, same.adapter.modules[m].A) for m, f in two.adapter.modules.items())


def test_one_adapter_alone_is_cut_in_the_metric_of_its_inputs():
    adapters, statistics = trio()
    one = adapters[0]
    ours = merge([one], "task_arithmetic", scale=1.0, rank=1, statistics=statistics).adapter.modules
    for m, f in one.modules.items():
        S = seconds({"a": statistics["a"]}, m)
        D = f.delta(torch.float64)
        torch.testing.assert_close(ours[m].delta(torch.float64), twin(D, S, 1)[0], atol=1e-5, rtol=1e-4)


def test_where_moments_lack_it_is_cut_by_weights_and_says_what_lacks():
    adapters, statistics = trio()
    plain = merge(adapters, "tsv", scale=1.0, rank=2)
    lacking = {**statistics, "b": moments(1, modules=("l.0.q",))}
    for given, reason in ((lacking, "hold no moments of l.0.v"), ({"a": statistics["a"]}, "no second moments of b")):
        done = merge(adapters, "tsv", scale=1.0, rank=2, statistics=given)
        assert done.record.cut.startswith("by weights") and reason in done.record.cut
        assert all(torch.equal(f.A, plain.adapter.modules[m].A) for m, f in done.adapter.modules.items())
        assert done.record.loss == plain.record.loss
    svd = merge(adapters, "svd", scale=1.0, rank=2, statistics=statistics)
    assert svd.record.cut == "by weights, as svd does"


def test_without_a_cut_statistics_change_nothing():
    adapters, statistics = trio()
    for rank in (None, 9):
        one = merge(adapters, "tsv", scale=1.0, rank=rank, statistics=statistics)
        two = merge(adapters, "tsv", scale=1.0, rank=rank)
        assert replace(one.record, cut=None) == two.record and one.record.cut is None
        assert all(torch.equal(f.A, two.adapter.modules[m].A) for m, f in one.adapter.modules.items())


def test_the_curve_says_what_a_cut_to_each_rank_would_lose():
    adapters, statistics = trio()
    for row in rank_curve(adapters, "task_arithmetic", scale=1.0, ranks=[1, 2, 5], statistics=statistics):
        done = merge(adapters, "task_arithmetic", scale=1.0, rank=row.rank, statistics=statistics)
        assert row.discarded_energy == pytest.approx(done.record.loss.discarded_energy, rel=1e-4)
        assert row.cut == IN_THE_METRIC and row.verification_error < 1e-5
    assert rank_curve(adapters, "task_arithmetic", scale=1.0)[0].cut is None


def test_inputs_of_zeros_leave_nothing_to_choose_by():
    adapters, statistics = trio()
    dead = {n: replace(s, sites={**s.sites, "l.0.v": Moments.zero(8)}) for n, s in statistics.items()}
    ours = merge(adapters, "tsv", scale=1.0, rank=2, statistics=dead).adapter.modules
    wanted = truncated(merge(adapters, "tsv", scale=1.0).adapter.modules["l.0.v"], 2)[0]
    torch.testing.assert_close(ours["l.0.v"].delta(), wanted.delta(), atol=1e-5, rtol=1e-5)


def test_the_command_says_so_and_the_record_too(tmp_path, capsys):
    adapters, statistics = trio()
    folders, files = [], []
    for a in adapters:
        (tmp_path / a.name).mkdir()
        write_adapter(tmp_path / a.name, a)
        folders.append(str(tmp_path / a.name))
        write_statistics(tmp_path / f"{a.name}.stats.safetensors", statistics[a.name])
        files.append(f"--stats={a.name}={tmp_path / a.name}.stats.safetensors")

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["merge", *folders, *arguments])
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out

    common = ("--method", "task_arithmetic", "--scale", "1", "--rank", "2")
    out = tmp_path / "out"
    said = run(*common, *files, "--out", str(out))
    assert f"of what the update puts out (cut {IN_THE_METRIC})" in said
    manifest = json.loads((out / "plait.json").read_text())
    assert manifest["result"]["cut"] == IN_THE_METRIC and manifest["options"]["cut"] == "inputs"
    assert "what the update puts out" in (out / "README.md").read_text()
    said = run(*common, "--out", str(tmp_path / "plain"))
    assert "of the update's energy\n" in said and "cut so" not in said
    plain = json.loads((tmp_path / "plain" / "plait.json").read_text())
    assert "cut" not in plain["result"] and "cut" not in plain["options"]
    with pytest.raises(UsageError, match="leave --stats out"):
        from plait.merging.planning import require_use
        from plait.merging.spec import MergeSpec

        require_use(MergeSpec("task_arithmetic", scale=1.0), statistics, 3)
    again = merge_folders(
        folders, out, "task_arithmetic", scale=1.0, rank=2, statistics={f.split("=")[1]: f.split("=")[2] for f in files}
    )
    assert again.reused and again.record.cut == IN_THE_METRIC
