"""The scale of a merge where nobody says one: the rule, what moments say, and what the record and the screen tell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.cli import main
from plait.errors import UsageError
from plait.merging import merge, merge_folders, merge_methods
from plait.merging.changes import Change
from plait.merging.editing import edit
from plait.merging.record import IN_THE_METRIC
from plait.merging.scales import REACH, RULES, scale_by_moments, scale_by_rule
from plait.statistics.files import write_statistics
from plait.statistics.moments import ModuleInfo, Moments, Statistics

RESULTS = Path(__file__).parents[2] / "docs" / "results"
WIDTH, OUT = 10, 12


def adapter(name: str, seed: int, size: float = 1.0) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    modules = {
        m: LoraFactors(torch.randn(3, WIDTH, generator=g), size * torch.randn(OUT, 3, generator=g), 2.0)
        for m in ("l.0.q", "l.0.v")
    }
    return Adapter(name, "base", modules)


def moments(seed: int, scale: float = 1.0) -> Statistics:
    g = torch.Generator().manual_seed(seed)
    H, W = scale * torch.randn(50, WIDTH, generator=g), torch.randn(OUT, WIDTH, generator=g)
    S = H.T @ H
    energy = float((W @ S @ W.T).trace())
    modules = {m: ModuleInfo(site="l.0", shape=(OUT, WIDTH), output_energy=energy) for m in ("l.0.q", "l.0.v")}
    return Statistics({"l.0": Moments(50, H.sum(0), S)}, modules, {"task": str(seed)})


def trio() -> list[Adapter]:
    return [adapter("a", 0), adapter("b", 1, 0.2), adapter("c", 2, 3.0)]


@pytest.mark.parametrize(("method", "calibration"), sorted(RULES, key=str))
def test_the_rule_by_number_of_adapters(method, calibration):
    c, p = RULES[method, calibration]
    assert scale_by_rule(method, calibration, (1.0,) * 8).value == pytest.approx(c * 8**p, rel=5e-3)
    assert scale_by_rule(method, calibration, (1.0, 1.0, 0.0)).value == pytest.approx(c * 2**p, rel=5e-3)
    assert scale_by_rule(method, calibration, (1.0, 0.0)).value == 1.0  # one adapter stays as it is


def test_a_sum_whose_weights_were_given_is_what_they_say():
    for weights in ((1.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 1.0, 0.999), (0.5, 0.0, 0.0), (0.0, 0.0, 0.0)):
        done = merge(trio(), "task_arithmetic", weights=weights)
        said = "the weights say how much of each is added" if any(weights) else "all weights are 0, and nothing is left"
        assert (done.record.scale, done.record.scale_reason) == (1.0, said)
    assert (
        merge(trio(), "task_arithmetic").record.scale == scale_by_rule("task_arithmetic", None, (1.0,) * 3).value != 1.0
    )
    assert (
        "stays as it is"
        not in scale_by_rule("tsv", None, (-1.0, 0.0)).reason + scale_by_rule("tsv", None, (0.0,)).reason
    )


def test_rules_are_for_methods_that_exist():
    assert {m for m, _ in RULES} <= set(merge_methods())


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_exact_sums_stay_exact_sums(method):
    done = merge(trio(), method)
    assert done.record.scale == 1.0 and "exact sum" in done.record.scale_reason


def test_given_weights_say_how_much_is_added():
    done = merge(trio(), "task_arithmetic", weights=[0.5, 0.5, 1.0])
    assert done.record.scale == 1.0 and "weights" in done.record.scale_reason
    assert merge(trio(), "tsv", weights=[0.5, 0.5, 1.0]).record.scale == 0.7


def test_a_method_that_nobody_measured_stays_at_one_and_says_so():
    done = merge(trio(), "wudi")
    assert done.record.scale == 1.0 and "no rule was measured" in done.record.scale_reason


def test_a_given_scale_is_kept_and_has_no_reason():
    done = merge(trio(), "task_arithmetic", scale=1.0)
    assert done.record.scale == 1.0 and done.record.scale_reason == ""


def test_without_a_method_it_is_tsv_at_its_rule():
    done = merge(trio())
    twin = merge(trio(), "tsv", scale=0.7)
    assert (done.record.method, done.record.scale) == ("tsv", 0.7)
    for module, f in done.adapter.modules.items():
        assert torch.equal(f.A, twin.adapter.modules[module].A) and torch.equal(f.B, twin.adapter.modules[module].B)


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv", "ties", "regmean"])
def test_by_moments_outputs_move_as_far_as_under_their_own_adapter(method):
    """The defining property, from dense updates: the mean square ratio of output shifts at the chosen scale is the reach squared."""
    reach = {"regmean": 1.3}.get(method, 1.1)
    adapters, stats = trio(), {"a": moments(3), "b": moments(4, 5.0), "c": moments(5, 0.1)}
    done = merge(adapters, method, statistics=stats)
    assert done.record.scale_reason.startswith(f"{reach:g} times")
    ratios = []
    for a in adapters:
        S = stats[a.name].sites["l.0"].second.double()

        def shift(modules, S=S, name=a.name):
            return sum(
                float((f.delta().double() @ S @ f.delta().double().T).trace()) / stats[name].modules[m].output_energy
                for m, f in modules.items()
            )

        ratios.append(shift(done.adapter.modules) / shift(a.modules))
    assert sum(ratios) / 3 == pytest.approx(reach**2, rel=0.02)  # the scale has three digits


def test_moments_of_the_inputs_do_not_matter_in_size_or_units():
    adapters = trio()
    merged = merge(adapters, "task_arithmetic", scale=1.0).adapter.modules
    one = scale_by_moments(adapters, merged, {n: moments(i) for i, n in enumerate("abc")})
    other = scale_by_moments(adapters, merged, {n: moments(i, 7.0) for i, n in enumerate("abc")})
    assert one is not None and one == other


def test_equal_adapters_under_their_mean_need_no_scale_but_the_reach():
    same = [Adapter(n, "base", adapter("x", 9).modules) for n in "abc"]
    merged = merge(same, "task_arithmetic", weights=[1 / 3] * 3, scale=1.0).adapter.modules
    found = scale_by_moments(same, merged, dict.fromkeys("abc", moments(1)))
    assert found is not None and found.value == pytest.approx(REACH, rel=5e-3)


def test_statistics_that_lack_a_task_leave_the_rule():
    adapters = trio()
    merged = merge(adapters, "tsv", scale=1.0).adapter.modules
    assert scale_by_moments(adapters, merged, {"a": moments(1)}) is None
    record = merge(adapters, "tsv", statistics={"a": moments(1)}).record
    assert record.scale == 0.7
    assert record.scale_reason.endswith("any number of adapters (statistics say no scale: there are none for b, c)")
    elsewhere = replace(moments(1), modules={"l.9.q": moments(1).modules["l.0.q"]})
    record = merge(adapters, "tsv", statistics=dict.fromkeys("abc", elsewhere)).record
    assert record.scale == 0.7 and record.scale_reason.endswith("they are of other modules, or see no change)")


def saved(folder: Path, one: Adapter) -> Path:
    folder.mkdir(parents=True)
    write_adapter(folder, one)
    return folder


def test_folders_take_the_scale_that_statistics_say_and_keep_its_reason(tmp_path):
    folders = [saved(tmp_path / a.name, a) for a in trio()]
    files = {}
    for i, a in enumerate(trio()):
        files[a.name] = tmp_path / f"{a.name}.stats.safetensors"
        write_statistics(files[a.name], moments(i))
    found = merge_folders(folders, tmp_path / "by_moments", statistics=files)
    twin = merge(trio(), "tsv", statistics={a.name: moments(i) for i, a in enumerate(trio())})
    assert found.record.method == "tsv" and found.record.scale == twin.record.scale != 0.7
    assert "statistics" in found.record.scale_reason and found.record.verification_error < 1e-5
    read = read_adapter(tmp_path / "by_moments")
    for m, f in read.modules.items():
        torch.testing.assert_close(f.delta(), twin.adapter.modules[m].delta())


def test_the_screen_says_method_scale_and_why(tmp_path, capsys):
    def run(arguments: list[str]) -> int:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return int(ended.value.code or 0)

    folders = [str(saved(tmp_path / a.name, a)) for a in trio()]
    assert run(["merge", *folders, "--out", str(tmp_path / "m")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tsv at scale 0.7 of a, b, c") and "the rule for tsv, the same for any number" in said
    assert (
        run(["merge", *folders, "-m", "task_arithmetic", "--scale", "1", "--out", str(tmp_path / "s"), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["scale"] == 1.0
    assert run(["merge", *folders, "--scale", "much", "--out", str(tmp_path / "t")]) == 2


def test_statistics_that_nothing_reads_are_refused(tmp_path):
    from plait.merging import MergeRequest, MergeSpec, answer

    folders = [str(saved(tmp_path / a.name, a)) for a in trio()]
    file = tmp_path / "a.stats.safetensors"
    write_statistics(file, moments(0))
    with pytest.raises(UsageError, match="takes no statistics, and the scale is given"):
        answer(MergeRequest(folders, tmp_path / "m", MergeSpec("tsv", scale=0.5), statistics={"a": file}))
    with pytest.raises(UsageError, match="takes no statistics, and the weights say how much"):
        answer(MergeRequest(folders, tmp_path / "m", MergeSpec(weights=[1.0, 0.5, 1.0]), statistics={"a": file}))


def test_an_edit_asks_again_for_statistics_that_chose_the_scale_or_the_cut(tmp_path):
    folders = [str(saved(tmp_path / a.name, a)) for a in [*trio(), adapter("d", 5)]]
    files = {name: tmp_path / f"{name}.stats.safetensors" for name in "abcd"}
    for i, file in enumerate(files.values()):
        write_statistics(file, moments(i))
    of_three = {n: files[n] for n in "abc"}
    out, weights = tmp_path / "out", "adapter_model.safetensors"
    for method in ("tsv", "task_arithmetic"):
        whole = tmp_path / method
        first = merge_folders(folders[:3], whole, method, statistics=of_three).record
        with pytest.raises(UsageError, match="statistics chose its scale"):
            edit(whole, Change(remove=["c"]), out)
        edit(whole, Change(add=folders[3:], statistics=files), tmp_path / f"{method}-more")
        merge_folders(folders, tmp_path / f"{method}-anew", method, statistics=files)
        assert (tmp_path / f"{method}-more" / weights).read_bytes() == (
            tmp_path / f"{method}-anew" / weights
        ).read_bytes()
        softer = edit(whole, Change(weights={"c": 0.5}), tmp_path / f"{method}-softer").record
        assert (softer.scale, softer.scale_reason) == (first.scale, first.scale_reason)
    cut = tmp_path / "cut"
    merge_folders(folders[:3], cut, "task_arithmetic", statistics=of_three, rank=2)
    with pytest.raises(UsageError, match="statistics decided what its cut to rank keeps"):
        edit(cut, Change(weights={"c": 0.5}), out)
    again = edit(cut, Change(weights={"c": 0.5}, statistics=of_three), tmp_path / "cut-again").record
    assert again.cut == IN_THE_METRIC and not out.exists()


def test_the_published_table_is_of_these_rules():
    rows = json.loads((RESULTS / "scales.json").read_text())
    assert rows["reach"] == REACH
    for row in rows["rows"]:
        name, _, calibration = row["method"].removesuffix(" (own moments)").partition(" + ")
        assert row["default"] == scale_by_rule(name, calibration or None, (1.0,) * row["tasks"]).value


def test_regmean_by_moments_loses_less_than_by_its_rule_on_both_kinds_of_base():
    """The evidence for reading its scale off moments: measured curves of an encoder and of a decoder, plain adapters."""
    rows = json.loads((RESULTS / "scales.json").read_text())["rows"]
    mine = [r for r in rows if r["method"] == "regmean" and "lost_by_base_moments" in r and r["arm"] == "kaiming"]
    assert {r["base"] for r in mine} == {"all-mpnet-base-v2", "qwen15"}
    for base in {r["base"] for r in mine}:
        of_base = [r for r in mine if r["base"] == base]
        by_moments = sum(r["lost_by_base_moments"] for r in of_base) / len(of_base)
        assert by_moments < 3 and by_moments < sum(r["lost"] for r in of_base) / len(of_base)
