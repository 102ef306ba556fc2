"""Adapters on adapters, and merges changed after the fact."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import resealed

from plait.adapters.config import CONFIG
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.disk.store import identity, read_manifest, staged_folder
from plait.errors import InputError, UsageError
from plait.merging import MergeRequest, MergeSpec, answer, merge_folders
from plait.merging.changes import Change
from plait.merging.editing import edit

MODULES = {"layer.q": (7, 5), "layer.v": (6, 5)}


def write(root: Path, name: str, seed: int, base: str = "some/base", rank: int = 2, **options) -> Path:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        m: LoraFactors(torch.randn(rank, i, generator=generator), torch.randn(o, rank, generator=generator), 1.5)
        for m, (o, i) in MODULES.items()
    }
    (root / name).mkdir(parents=True)
    write_adapter(root / name, Adapter(name, base, factors, **options))
    return root / name


def update(folder: Path) -> dict[str, torch.Tensor]:
    return {m: f.delta(torch.float64) for m, f in read_adapter(folder).modules.items()}


def close(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for module, delta in wanted.items():
        torch.testing.assert_close(found[module], delta, rtol=tolerance, atol=tolerance)


@pytest.fixture
def adapters(tmp_path) -> dict[str, Path]:
    return {name: write(tmp_path, name, seed) for seed, name in enumerate("abcd")}


# --- stacks -----------------------------------------------------------------------------------------------------------


def test_stack_in_any_order_given(tmp_path):
    first = write(tmp_path, "first", 0)
    second = write(tmp_path, "second", 1, base=str(first), rank=3)
    third = write(tmp_path, "third", 2, base="second")  # beside it
    found = answer(MergeRequest([str(f) for f in (third, first, second)], tmp_path / "out", stack=True))
    assert [s.name for s in found.record.stack] == ["first", "second", "third"]
    assert found.record.base == "some/base"
    total = {m: sum(update(f)[m] for f in (first, second, third)) for m in MODULES}
    close(update(tmp_path / "out"), total)
    assert read_adapter(tmp_path / "out").base == "some/base"
    assert read_adapter(tmp_path / "out").rank == 7


def test_stack_on_a_merge(tmp_path, adapters):
    merge_folders([str(adapters["a"]), str(adapters["b"])], tmp_path / "m", "task_arithmetic", scale=0.5)
    top = write(tmp_path, "top", 9, base=str(tmp_path / "m"))
    answer(MergeRequest([str(tmp_path / "m"), str(top)], tmp_path / "out", stack=True))
    a, b, t = (update(f) for f in (adapters["a"], adapters["b"], top))
    close(update(tmp_path / "out"), {m: 0.5 * (a[m] + b[m]) + t[m] for m in MODULES})


def test_only_the_topmost_head_stays(tmp_path):
    heads = [{n: {"classifier.weight": torch.full((2, 7), float(i))}} for i, n in enumerate(("first", "second"))]
    first = write(tmp_path, "first", 0, task_type="SEQ_CLS", prefix="bert", heads=heads[0])
    second = write(tmp_path, "second", 1, base=str(first), task_type="SEQ_CLS", prefix="bert", heads=heads[1])
    answer(MergeRequest([str(first), str(second)], tmp_path / "out", stack=True))
    assert list(read_adapter(tmp_path / "out").heads) == ["second"]


def test_stacks_that_nothing_records(tmp_path, adapters):
    def stacked(*folders):
        answer(MergeRequest([str(f) for f in folders], tmp_path / "out", stack=True))

    with pytest.raises(InputError, match="nothing recorded says"):
        stacked(adapters["a"], adapters["b"])
    top = write(tmp_path, "top", 9, base=str(adapters["c"]))
    with pytest.raises(InputError, match="not among the adapters given"):
        stacked(adapters["a"], top)
    twin = write(tmp_path, "twin", 8, base=str(adapters["c"]))
    with pytest.raises(InputError, match="a stack has one on each"):
        stacked(adapters["c"], top, twin)
    with pytest.raises(UsageError, match="--stack adds the updates as they are"):
        answer(MergeRequest([str(adapters["c"]), str(top)], tmp_path / "out", MergeSpec("ties"), stack=True))
    assert not (tmp_path / "out").exists()


def test_a_continued_adapter_is_no_stack(tmp_path):
    first = write(tmp_path, "first", 0)
    read = read_adapter(first)
    on = {m: LoraFactors(f.A + 0.01, f.B * 1.1, f.scaling) for m, f in read.modules.items()}
    (tmp_path / "second").mkdir()
    write_adapter(tmp_path / "second", Adapter("second", "some/base", on))
    with pytest.raises(InputError, match=r"one adapter at two stages of training \(their A agree to 0.99"):
        answer(MergeRequest([str(first), str(tmp_path / "second")], tmp_path / "out", stack=True))


def test_an_ordinary_merge_points_to_the_stack(tmp_path):
    first = write(tmp_path, "first", 0)
    second = write(tmp_path, "second", 1, base=str(first))
    with pytest.raises(InputError, match="--stack"):
        merge_folders([str(first), str(second)], tmp_path / "out", "task_arithmetic", scale=1.0)


# --- edits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", None])
def test_a_scale_that_nobody_gave_is_chosen_anew_where_adapters_come_or_go(tmp_path, adapters, method):
    a, b, c, d = (str(adapters[n]) for n in "abcd")
    for folders, name in (([a, b, c], "abc"), ([a, b], "ab"), ([a, b, c, d], "abcd")):
        merge_folders(folders, tmp_path / name, method)
    weights = "adapter_model.safetensors"
    for change, wanted in ((Change(remove=["c"]), "ab"), (Change(add=[d]), "abcd")):
        done = edit(tmp_path / "abc", change, tmp_path / f"now-{wanted}")
        rule = "tsv, the same for any number of" if method is None else f"{len(wanted)} adapters by {method}"
        assert done.record.scale_reason.startswith(f"the rule for {rule}")
        assert (tmp_path / f"now-{wanted}" / weights).read_bytes() == (tmp_path / wanted / weights).read_bytes()


def test_a_scale_that_was_given_stays_and_so_does_what_weights_say(tmp_path, adapters):
    abc = [str(adapters[n]) for n in "abc"]
    merge_folders(abc, tmp_path / "given", "task_arithmetic", scale=0.4)
    assert edit(tmp_path / "given", Change(remove=["c"]), tmp_path / "given-ab").record.scale == 0.4
    merge_folders(abc, tmp_path / "sum", "task_arithmetic", weights=[1.0, 1.0, 1.0])
    assert edit(tmp_path / "sum", Change(remove=["c"]), tmp_path / "sum-ab").record.scale == 1.0


@pytest.mark.parametrize("by_difference", [False, True])
def test_a_new_weight_leaves_a_chosen_scale_alone_and_later_edits_still_choose_it(tmp_path, adapters, by_difference):
    """0.635 of three, 0.778 of two and 0.55 of four, whatever the weights; all of it against the dense sum."""
    deltas = {n: update(adapters[n]) for n in "abcd"}
    merge_folders([str(adapters[n]) for n in "abc"], tmp_path / "now", "task_arithmetic")
    steps = (
        (Change(weights={"c": 0.5}), 0.635, "the rule for 3", {"a": 1.0, "b": 1.0, "c": 0.5}),
        (Change(add=[str(adapters["d"])]), 0.55, "the rule for 4", {"a": 1.0, "b": 1.0, "c": 0.5, "d": 1.0}),
        (Change(weights={"d": 0.0}), 0.635, "the rule for 3", {"a": 1.0, "b": 1.0, "c": 0.5, "d": 0.0}),
        (Change(remove=["c", "d"]), 0.778, "the rule for 2", {"a": 1.0, "b": 1.0}),
        (Change(add=[str(adapters["c"])]), 0.635, "the rule for 3", {"a": 1.0, "b": 1.0, "c": 1.0}),
        (Change(remove=["a", "b"]), 1.0, "one adapter", {"c": 1.0}),
    )
    for i, (change, scale, reason, weights) in enumerate(steps):
        before, now = tmp_path / ("now" if i == 0 else f"now{i}"), tmp_path / f"now{i + 1}"
        record = edit(before, change, now, by_difference=by_difference).record
        assert record.scale == scale and record.scale_reason.startswith(reason), i
        assert dict(zip(record.tasks, record.weights, strict=True)) == weights
        wanted = {m: scale * sum(w * deltas[n][m] for n, w in weights.items()) for m in MODULES}
        close(update(now), wanted)


def test_a_scale_given_in_an_edit_stays_afterwards(tmp_path, adapters):
    merge_folders([str(adapters[n]) for n in "ab"], tmp_path / "m", None)
    edit(tmp_path / "m", Change(scale=0.4), tmp_path / "set")
    assert edit(tmp_path / "set", Change(add=[str(adapters["c"])]), tmp_path / "more").record.scale == 0.4


@pytest.mark.parametrize(("method", "options"), [("tsv", {}), ("ties", {"density": 0.5}), ("linear", {})])
def test_edited_is_what_merging_anew_gives(tmp_path, adapters, method, options):
    abc = [str(adapters[n]) for n in "abc"]
    merge_folders(abc, tmp_path / "m", method, options=options, weights=[1.0, 2.0, 0.5], scale=0.8)
    change = Change(add=[f"new={adapters['d']}"], remove=["b"], weights={"c": 0.7})
    found = edit(tmp_path / "m", change, tmp_path / "edited")
    assert found.record.tasks == ("a", "c", "new")
    again = [abc[0], abc[2], f"new={adapters['d']}"]
    merge_folders(again, tmp_path / "anew", method, options=options, weights=[1.0, 0.7, 1.0], scale=0.8)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "edited" / weights).read_bytes() == (tmp_path / "anew" / weights).read_bytes()
    assert (read_manifest(tmp_path / "edited") or {})["options"] == (read_manifest(tmp_path / "anew") or {})["options"]
    assert edit(tmp_path / "edited", Change(remove=["new"]), tmp_path / "once-more").record.tasks == ("a", "c")


def test_moved_changed_and_missing_inputs(tmp_path, adapters):
    merge_folders([str(adapters[n]) for n in "abc"], tmp_path / "m", "task_arithmetic", scale=1.0)
    shutil.move(adapters["a"], tmp_path / "elsewhere")
    shutil.rmtree(adapters["b"])
    shutil.copytree(adapters["d"], adapters["b"])
    with pytest.raises(InputError, match=r"'a' \(.*\) is gone; 'b' \(.*\) has changed since"):
        edit(tmp_path / "m", Change(weights={"c": 2.0}), tmp_path / "out")
    change = Change(remove=["b"], inputs={"a": tmp_path / "elsewhere"})
    assert edit(tmp_path / "m", change, tmp_path / "out").record.tasks == ("a", "c")
    (adapters["c"] / CONFIG).write_text("{")
    with pytest.raises(InputError, match=r"'c' \(.*\) cannot be read: not valid JSON"):
        edit(tmp_path / "m", change, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_a_base_that_was_given_for_two_names_of_it_stays(tmp_path, adapters):
    elsewhere = write(tmp_path, "e", 7, base="/folder/of/some-base")
    merge_folders([str(adapters["a"]), str(elsewhere)], tmp_path / "m", "task_arithmetic", scale=1.0, base="some/base")
    for change, out in ((Change(weights={"e": 0.5}), "half"), (Change(add=[str(adapters["b"])]), "more")):
        edit(tmp_path / "m", change, tmp_path / out)
        assert read_adapter(tmp_path / out).base == "some/base"
    a, e = update(adapters["a"]), update(elsewhere)
    close(update(tmp_path / "half"), {m: a[m] + 0.5 * e[m] for m in MODULES})


@pytest.mark.parametrize(("method", "share"), [("task_arithmetic", 1.0), ("linear", 0.5)])
def test_by_difference_needs_only_what_changes(tmp_path, adapters, method, share):
    merge_folders([str(adapters[n]) for n in "abc"], tmp_path / "m", method, scale=0.8)
    a, c, d = (update(adapters[n]) for n in "acd")
    for name in "ac":
        shutil.rmtree(adapters[name])
    found = edit(tmp_path / "m", Change(remove=["b"]), tmp_path / "less", by_difference=True)
    assert (found.record.tasks, found.record.rank) == (("a", "c"), 4)
    close(update(tmp_path / "less"), {m: 0.8 * share * (a[m] + c[m]) for m in MODULES})
    change = Change(remove=["b"], add=[f"e={adapters['d']}"], weights={"e": -1.0})
    if method == "task_arithmetic":
        edit(tmp_path / "m", change, tmp_path / "other", by_difference=True)
        close(update(tmp_path / "other"), {m: 0.8 * (a[m] + c[m] - d[m]) for m in MODULES})
    edit(tmp_path / "less", Change(add=[f"b={adapters['b']}"]), tmp_path / "back", by_difference=True)
    close(update(tmp_path / "back"), update(tmp_path / "m"))
    with pytest.raises(InputError, match=r"'a' .* is gone"):
        edit(tmp_path / "m", Change(remove=["a"]), tmp_path / "never", by_difference=True)


def test_what_cannot_be_edited(tmp_path, adapters):
    merge_folders([str(adapters[n]) for n in "ab"], tmp_path / "m", "ties", scale=1.0)
    out = tmp_path / "out"
    for merged, change, message in (
        (adapters["a"], Change(), "no record of a merge"),
        (tmp_path / "none", Change(), "no such merge"),
    ):
        with pytest.raises(InputError, match=message):
            edit(merged, change, out)
    for change, message in (
        (Change(remove=["x"]), "no adapter 'x' in this merge"),
        (Change(add=[str(adapters["a"])]), "'a' is in this merge already"),
        (Change(remove=["a", "b"]), "no adapter is left"),
        (Change(weights={"z": 1.0}), "no adapter 'z' in the result"),
    ):
        with pytest.raises(UsageError, match=message):
            edit(tmp_path / "m", change, out)
    merge_folders([str(adapters[n]) for n in "ab"], tmp_path / "sum", "task_arithmetic", scale=1.0)
    with pytest.raises(UsageError, match="takes neither --scale"):
        edit(tmp_path / "sum", Change(remove=["a"], scale=0.5), out, by_difference=True)
    with pytest.raises(UsageError, match="no weighted sum"):
        edit(tmp_path / "m", Change(remove=["a"]), out, by_difference=True)
    merge_folders([str(adapters[n]) for n in "ab"], tmp_path / "cut", "task_arithmetic", rank=1, scale=1.0)
    with pytest.raises(UsageError, match="cut or calibrated"):
        edit(tmp_path / "cut", Change(remove=["a"]), out, by_difference=True)
    manifest = json.loads((tmp_path / "m" / "plait.json").read_text())
    resealed(tmp_path / "m", stage="merge-auto")
    with pytest.raises(InputError, match="was chosen by merge auto"):
        edit(tmp_path / "m", Change(remove=["a"]), out)
    for adapters_then in (None, "a", [{"name": "a"}], [{"name": "a", "sha256": "0", "weight": "much"}]):
        result = {**manifest["result"], "adapters": adapters_then}
        resealed(tmp_path / "m", stage="merge", result=result)
        with pytest.raises(InputError, match="does not name its inputs"):
            edit(tmp_path / "m", Change(remove=["a"]), out)
    assert not out.exists()


# --- heads ------------------------------------------------------------------------------------------------------------


def test_a_merge_records_the_classes_of_every_head_of_which_they_are_known(tmp_path):
    def headed(name: str, seed: int, labels: list[str] | None) -> str:
        plain = read_adapter(write(tmp_path / "plain", name, seed))
        head = {"classifier.weight": torch.full((len(labels or "ab"), 5), float(seed))}
        result = {"task": name, **({"labels": labels} if labels else {})}
        with staged_folder(tmp_path / name, identity("test", {"name": name}), result=result) as folder:
            write_adapter(folder, replace(plain, task_type="SEQ_CLS", prefix="model", heads={name: head}))
        return str(tmp_path / name)

    def recorded(name: str) -> object:
        return read_manifest(tmp_path / name)["result"].get("labels")

    known = {"a": ["no", "yes"], "b": ["low", "middle", "high"]}
    one, two, three = headed("a", 1, known["a"]), headed("b", 2, known["b"]), headed("c", 3, None)
    merge_folders([one, two, three], tmp_path / "merged", "task_arithmetic", scale=1.0)
    assert recorded("merged") == known and read_adapter(tmp_path / "merged").classes == known
    merge_folders(
        [str(tmp_path / "merged"), headed("d", 4, ["x", "y"])], tmp_path / "again", "task_arithmetic", scale=1.0
    )
    assert recorded("again") == {**known, "d": ["x", "y"]}
    for how in (True, False):
        edit(tmp_path / "merged", Change(remove=["a"]), tmp_path / f"without-{how}", by_difference=how)
        assert recorded(f"without-{how}") == {"b": known["b"]}
    merge_folders([three], tmp_path / "unknown", "task_arithmetic", scale=1.0)
    assert not recorded("unknown")
