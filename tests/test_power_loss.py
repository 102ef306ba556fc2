"""A power loss at any moment of a merge leaves the old result, the new one, or an error; and the replay finds what is unsafe."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.trust.power import control, lasting, states, verdict, verdict_of_units
from benchmarks.trust.power_loss import FLUSHES, WAYS, Data, Entries, Flush, Record, Tree, after, without
from benchmarks.trust.power_loss import lay as lay_tree
from benchmarks.trust.recording import recorded
from benchmarks.trust.small import COMMANDS, contents, require_done

from plait.disk.manifest import MANIFEST, sealed
from tests.robustness.world import build

MERGE = ("merge", "M", "x=B", "--out", "out")  # M has heads, which lie in a folder of their own


def fell(found: list[Tree], scratch: Path, new: dict[str, bytes]) -> list[str]:
    """What is wrong in states that a power loss may leave."""
    said = []
    for tree in found:
        lay_tree(tree, scratch)
        said.append(verdict(scratch / "out", {}, new))
    return [text for text in said if text]


@pytest.mark.skipif(not shutil.which("strace"), reason="the steps are recorded by strace")
@pytest.mark.timeout(240)
def test_a_merge_with_heads_whose_power_goes(tmp_path):
    world = tmp_path / "world"
    world.mkdir()
    build(world)
    record, code = recorded(MERGE, world, tmp_path / "log")
    new = contents(world / "out")
    assert code == 0 and "heads/a.safetensors" in new
    found = [tree for _, tree in states(record, 1, 0)]
    assert len(found) > 30 and not fell(found, tmp_path / "scratch", new)
    assert not lasting(record, "out", new)
    for kind in FLUSHES:  # what each of them is for
        assert len(without(record, kind).steps) < len(record.steps)
        assert lasting(without(record, kind), "out", new)


@pytest.mark.skipif(not shutil.which("strace"), reason="the steps are recorded by strace")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", FLUSHES)
def test_the_replay_of_a_result_in_the_place_of_another_falls_where_flushes_are_left_out(tmp_path, kind, replaced):
    """The one that was there is removed last: without the flushes before that, neither may be left."""
    record, old, new = replaced
    assert not control(record, kind, "out", old, new, tmp_path / "scratch")
    found = [tree for _, tree in states(without(record, kind), 1, 0)]
    said = [verdict_of(tree, tmp_path / "scratch", old, new) for tree in found]
    assert "neither the old result nor the new one is there" in said
    whole = [verdict_of(tree, tmp_path / "scratch", old, new) for _, tree in states(record, 1, 0)]
    assert not any(whole)


@pytest.fixture(scope="module")
def replaced(tmp_path_factory):
    """A merge with --overwrite over another, recorded: the record, what was there, what came."""
    root = tmp_path_factory.mktemp("replaced")
    (root / "world").mkdir()
    build(root / "world")
    require_done((*MERGE, "--method", "ties"), root / "world")
    old = contents(root / "world" / "out")
    record, code = recorded((*MERGE, "--overwrite"), root / "world", root / "log")
    new = contents(root / "world" / "out")
    assert code == 0 and old != new
    return record, old, new


def verdict_of(tree: Tree, scratch: Path, old: dict[str, bytes], new: dict[str, bytes]) -> str:
    lay_tree(tree, scratch)
    return verdict(scratch / "out", old, new)


# --- the replay itself ------------------------------------------------------------------------------------------------


def record_of(*steps: Data | Entries | Flush) -> Record:
    """A folder "out" (1) with a file (2) written beside it as "new", in a folder (3)."""
    return Record(files={1: b"old", 2: b""}, folders={0: {"out": 1}}, steps=list(steps))


NAMED = Entries(0, (("new", 2),))
FILLED = Data(2, b"new")
RENAMED = Entries(0, (("out", 2), ("new", None)))


@pytest.mark.parametrize(
    ("steps", "possible"),
    [
        ((NAMED, FILLED, RENAMED), {b"old", b"new", b""}),
        ((NAMED, FILLED, Flush(2), RENAMED), {b"old", b"new", b""}),  # empty only before the rename
        ((NAMED, FILLED, Flush(2), RENAMED, Flush(0)), {b"new"}),
    ],
)
def test_what_may_be_there_in_the_end(steps, possible):
    record = record_of(*steps)
    there = {after(record, len(steps), way)["out"] for way in WAYS}
    assert there <= possible and (b"new" in there)
    if Flush(2) in steps:
        assert b"" not in there


def test_an_entry_that_was_not_flushed_may_be_gone_and_a_flushed_one_may_not():
    steps = (NAMED, FILLED, Flush(2))
    assert "new" not in after(record_of(*steps), 3, "dropped")
    assert after(record_of(*steps, Flush(0)), 4, "dropped")["new"] == b"new"
    assert after(record_of(NAMED, Flush(0), FILLED), 3, "dropped")["new"] == b""


@pytest.fixture
def new(tmp_path) -> dict[str, bytes]:
    """The files of a small result."""
    world = tmp_path / "whole"
    world.mkdir()
    build(world)
    return contents(world / "M")


def lay(place: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)


def test_half_a_result_without_its_manifest_is_found(tmp_path, new):
    """What a command that writes its files straight to their place would leave."""
    lay(tmp_path / "out", {n: d for n, d in new.items() if n != MANIFEST})
    assert "half a result is accepted" in verdict(tmp_path / "out", {}, new)


def test_units_of_a_run_are_gone_whole_or_refused(tmp_path, new):
    whole = {f"merged/{i}/{n}": d for i in range(2) for n, d in new.items()} | {"report.json": b"{}"}
    lay(tmp_path / "run", {n: d for n, d in whole.items() if not n.startswith("merged/1")})
    assert verdict_of_units(tmp_path / "run", {}, whole) == ""
    head = next(n for n in whole if n.startswith("merged/1/heads/"))
    lay(tmp_path / "run", {n: d for n, d in whole.items() if n != head})
    assert verdict_of_units(tmp_path / "run", {}, whole) == ""  # by its manifest it is seen to be half
    manifest = json.loads(whole["merged/1/plait.json"])
    record = {k: v for k, v in manifest.items() if k not in ("files", "sizes", "manifest_sha256")}
    (tmp_path / "run/merged/1/plait.json").write_text(json.dumps(sealed(record, {})))
    lax = [n for n in whole if n.startswith("merged/1/") and n != "merged/1/plait.json"]
    for name in lax:
        (tmp_path / "run" / name).unlink(missing_ok=True)
    assert verdict_of_units(tmp_path / "run", {}, whole) == "half a unit is taken for done: merged/1"


def test_a_whole_result_passes_and_a_damaged_one_is_refused(tmp_path, new):
    lay(tmp_path / "out", new)
    assert verdict(tmp_path / "out", {}, new) == ""
    head = next(n for n in new if n.startswith("heads/"))
    (tmp_path / "out" / head).write_bytes(bytes(len(new[head])))
    assert verdict(tmp_path / "out", {}, new) == ""


def test_an_old_result_that_is_gone_is_found_and_one_aside_is_not_lost(tmp_path, new):
    old = {**new, "adapter_config.json": b"{}"}
    assert "neither" in verdict(tmp_path / "out", old, new)
    lay(tmp_path / ".out.replaced", old)
    assert verdict(tmp_path / "out", old, new) == ""


def test_states_are_distinct_and_begin_and_end_with_what_was_and_is():
    record = record_of(NAMED, FILLED, Flush(2), RENAMED, Flush(0))
    trees = [tree for _, tree in states(record, 2, 0)]
    assert Counter(str(sorted(t.items())) for t in trees).most_common(1)[0][1] == 1
    assert {"out": b"old"} in trees and {"out": b"new"} in trees
    assert COMMANDS["merge --overwrite"].before
