"""A choice that is ended at any moment and started again goes on where it was, and gives the bits of one that was not."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from plait.adapters.heads import HeadFacts
from plait.choosing import asking, auto, choose
from plait.choosing.auto_folders import merge_auto_folders
from plait.choosing.auto_settings import AutoSettings
from plait.choosing.counting import Behind, making
from plait.disk.locks import locked
from plait.errors import EnvironmentFault, RunError, UsageError
from plait.learning import checkpoints
from plait.learning.checkpoint_files import Answered, Piece, State, read_identity, read_state, write_state
from plait.learning.checkpoint_reach import FIT, LEARNT_HEADS, MERGE, REPAIR, THE_REPAIR, WEIGHING, WEIGHTS
from plait.model.base import BaseModel
from plait.training.checkpoints import checkpoint_root, open_root, seal
from tests.choosing.ended import Killed, contents, killed_after
from tests.panels import folders_of, texts_of

HEADS = AutoSettings(
    methods=("tsv",), scales=(0.4,), refine=9, repair=9, learn_heads=True, max_length=24
)  # fmt: skip
WRITING = AutoSettings(
    methods=("task_arithmetic",), scales=(0.3, 0.6), refine=3, repair=24, on_policy=True, new_tokens=3, max_length=24
)
CUT = AutoSettings(methods=("tsv",), scales=(0.4,), refine=3, repair=5, rank=2, max_shift=50.0, max_length=24)


@pytest.fixture
def every_step(monkeypatch, untimed):
    """What may be computed again is kept after every step that can be kept."""
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))


@pytest.mark.parametrize(
    ("architecture", "kind", "texts", "settings", "stages"),
    [
        ("bert", "classification", 18, HEADS, [
            "scores of merges", "of learning weights", "learnt weights", "the fits", "of the repair", "learnt heads are",
        ]),
        ("llama", "causal", 16, WRITING, ["what the adapters write", "the fits", "steps of the repair", "the repair are"]),
        ("bert", "classification", 16, CUT, ["the choice is there", "the repair are there", "and the heads are there"]),
    ],
)  # fmt: skip
def test_ended_after_every_checkpoint(
    make_panel, tmp_path, monkeypatch, every_step, architecture, kind, texts, settings, stages
):
    panel = make_panel(architecture, kind, texts=texts)
    folders = folders_of(panel, tmp_path)
    said: list[str] = []

    def run(name: str) -> None:
        asked = {"base": panel.base, "texts": dict(panel.texts), "general": texts_of(5, 7), "settings": settings}
        merge_auto_folders(folders, tmp_path / name / "out", **asked, on_progress=said.append)

    run("straight")
    assert not any(line.startswith("going on") for line in said)
    for _ in range(60):
        with monkeypatch.context() as once:
            killed_after(once, 1)
            try:
                run("ended")
            except Killed:
                continue
        break
    going_on = [line for line in said if line.startswith("going on from")]
    assert len(going_on) >= 8
    for stage in stages:
        assert any(stage in line for line in going_on), (stage, going_on)
    assert contents(tmp_path / "ended" / "out") == contents(tmp_path / "straight" / "out")
    assert not list(tmp_path.glob("*/.*"))


def test_what_is_done_is_not_done_again_and_not_counted(begun, monkeypatch):
    counted = []
    monkeypatch.setattr(auto, "told", lambda panel, adapters, work: counted.append(work) or "about a moment")
    with monkeypatch.context() as once:
        once.setattr(asking, "fidelities", lambda *_, **__: pytest.fail("scored again"))
        once.setattr(choose, "refined_weights", lambda *_, **__: pytest.fail("learnt again"))
        said = begun()
    assert said[1] == f"going on from {begun.root}: scores of merges and learnt weights are there"
    assert said[-1] == "what it keeps, on all texts"  # of many texts that takes a while
    assert not begun.root.exists()
    begun("whole")
    left, whole = counted
    assert (left.learnt, whole.learnt) == (0, 2)
    assert 0 < left.reads < whole.reads and (left.merges, left.moments) == (whole.merges, whole.moments)


@pytest.mark.parametrize(
    ("done", "less"),
    [
        (Behind({16: 4}), {"reads"}),
        (Behind({16: 8, 20: 2}), {"reads"}),
        (Behind({16: 8, 20: 2}, (WEIGHTS, FIT)), {"reads", "learnt", "fitted", "solved"}),
        (Behind({16: 8, 20: 2}, (WEIGHING,), learnt=4), {"reads", "learnt"}),
        (Behind(stages=(MERGE, REPAIR), repaired=30), {"reads", "learnt", "fitted", "solved", "merges", "moments", "repaired"}),
        (Behind(stages=(MERGE, THE_REPAIR, LEARNT_HEADS)), {"reads", "learnt", "fitted", "solved", "merges", "moments", "repaired"}),
    ],
)  # fmt: skip
def test_only_what_is_left_is_counted(make_panel, done, less):
    panel = make_panel(texts=20)
    asked = AutoSettings(methods=("tsv",), scales=(0.2, 0.4, 0.6, 0.8), refine=5, repair=50, learn_heads=True)
    whole, left = (making(panel, panel, asked, b) for b in (Behind(), done))
    assert {k for k, v in asdict(left).items() if v < asdict(whole)[k]} == less
    assert not {k for k, v in asdict(left).items() if v > asdict(whole)[k]}
    if done.repaired:
        assert left.repaired == 20


def test_a_result_that_is_refused_leaves_nothing(begun):
    with pytest.raises(RunError, match="no candidate moves general text"):
        begun(general=texts_of(5, 7), max_shift=1e-9, overwrite=True)
    assert not begun.root.exists()


def test_a_fault_of_the_machine_leaves_what_is_done(begun, monkeypatch):
    with monkeypatch.context() as once:
        once.setattr(auto, "finished", lambda *_, **__: (_ for _ in ()).throw(EnvironmentFault("no memory")))
        with pytest.raises(EnvironmentFault, match="no memory"):
            begun()
    assert begun()[1] == f"going on from {begun.root}: the choice is there"


def test_a_damaged_checkpoint_is_passed_over(begun):
    newest = sorted(begun.root.glob("checkpoint-*"))[-1]
    (newest / "state.json").write_text("{}")
    assert begun()[1] == f"going on from {begun.root}: scores of merges are there"


def test_what_this_version_does_not_read_is_begun_anew(begun):
    for checkpoint in begun.root.glob("checkpoint-*"):
        (checkpoint / "state.json").write_text('{"pieces": {"scores": 3}, "answered": [], "written": {}}')
        seal(checkpoint.rename(begun.root / "staging"), checkpoint)
    for checkpoint in begun.root.glob("checkpoint-*"):
        assert not read_identity(checkpoint)  # the folder's mark is asked
    said = begun()
    assert "not a state of a choice" in said[1] and said[1].endswith(": begun anew")
    assert not any(line.startswith("going on") for line in said) and not begun.root.exists()


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (lambda root, mine: root.symlink_to(mine), "a link"),
        (lambda root, mine: root.write_text("hers"), "a file"),
        (lambda root, mine: shutil.copytree(mine, root), "a folder of something else"),
    ],
)
def test_what_is_none_of_plaits_stays(begun, tmp_path, made, what):
    shutil.rmtree(begun.root)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("hers")
    made(begun.root, tmp_path / "mine")
    with pytest.raises(UsageError, match=f"{what} stands where checkpoints are kept"):
        begun()
    assert (begun.root if begun.root.is_file() else begun.root / "x").read_text() == "hers"
    with pytest.raises(UsageError, match=what):  # so do trainings
        open_root(begun.root, {})


def test_a_run_that_was_ended_before_its_mark_goes_on(begun):
    shutil.rmtree(begun.root)
    begun.root.mkdir()
    (begun.root / "identity.partial").write_text("{")
    begun()
    assert not begun.root.exists()


def test_where_there_is_no_room_nothing_is_kept_and_that_is_said(begun, monkeypatch):
    shutil.rmtree(begun.root)
    largest = max(p.adapter.nbytes for p in begun.panel.parts)  # what the result needs at least
    monkeypatch.setattr("plait.disk.space.shutil.disk_usage", lambda _: SimpleNamespace(free=largest))
    said = begun()
    assert sum(" is not kept: " in line for line in said) == 1  # of three checkpoints and more
    assert not begun.root.exists()


@pytest.mark.parametrize("settings", [{}, {"refine": 3}, {"refine": 3, "overwrite": True}])
def test_a_second_run_of_one_output_is_kept_out_and_leaves_what_is_there(begun, settings):
    before = contents(begun.root)
    with locked(begun.root, doing="plait merge auto"), pytest.raises(EnvironmentFault) as raised:
        begun(**settings)
    assert str(raised.value).startswith(f"{begun.root.parent / 'out'}: another process is making it: plait merge auto")
    assert contents(begun.root) == before
    assert begun()[1].startswith("going on")


def test_what_a_finished_run_left_is_removed(begun, tmp_path):
    shutil.copytree(begun.root, tmp_path / "aside")
    begun()
    shutil.copytree(tmp_path / "aside", begun.root)
    begun()
    assert not begun.root.exists()


def test_an_adapter_is_read_as_it_was(make_panel, tmp_path):
    """To the bit, with all that lies beside its factors, and with numbers that are none."""
    one = make_panel().parts[0].adapter
    modules = {m: replace(f, scaling=0.1 + i, A=f.A.to(torch.bfloat16)) for i, (m, f) in enumerate(one.modules.items())}
    one = replace(
        one, modules=modules, extras={"norm.weight": torch.tensor([float("inf"), -0.0])}, copies={"x": torch.ones(1, 2)},
        modules_to_save=("norm",), target_modules=("query", "value"), revision="abc", source={"labels": {"one": ["a", "b"]}, "layouts": {}},
        head_facts={"one": HeadFacts(("a", "b"), "regression", None, "bert")},
    )  # fmt: skip
    logits = torch.tensor([[1.0, float("nan")]])
    state = State(
        {"x": Piece({"n": 1}, {"t": torch.tensor(2.5)}, {"a": one})},
        (Answered("one", "base", 0.3, (4,), logits),),
        {"one": {3: (1, 2)}},
    )
    write_state(tmp_path, state)
    found = read_state(tmp_path)
    again = found.pieces["x"].adapters["a"]
    assert list(again.modules) == list(one.modules)
    for m, f in one.modules.items():
        g = again.modules[m]
        assert (
            torch.equal(g.A, f.A)
            and torch.equal(g.B, f.B)
            and (g.A.dtype, g.scaling, g.kind) == (f.A.dtype, f.scaling, f.kind)
        )
    for name in ("heads", "extras", "copies"):
        a, b = (torch.utils._pytree.tree_flatten(getattr(x, name)) for x in (again, one))
        assert a[1] == b[1] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    rest = {"modules": {}, "heads": {}, "extras": {}, "copies": {}}
    assert replace(again, **rest) == replace(one, **rest)
    assert found.written == state.written and found.pieces["x"].values == {"n": 1}
    assert torch.equal(found.pieces["x"].tensors["t"], torch.tensor(2.5))
    (a,) = found.answered
    assert (a.task, a.who, a.scale, a.places) == ("one", "base", 0.3, (4,)) and torch.equal(
        a.logits.isnan(), logits.isnan()
    )


# --- a process that is killed -----------------------------------------------------------------------------------------


def start(folder: str, folders: list[str], texts, out: str) -> None:
    """One start of a choice with a repair, in a process of its own."""
    torch.set_num_threads(1)
    checkpoints.SHARE = float("inf")
    settings = AutoSettings(methods=("tsv",), scales=(0.4,), refine=2, fit=False, repair=40, max_length=24)
    merge_auto_folders(folders, Path(out), base=BaseModel(folder, device="cpu"), texts=texts, settings=settings)


def test_a_process_that_is_killed_goes_on(make_panel, tmp_path):
    panel = make_panel(texts=36)
    folders = folders_of(panel, tmp_path)
    context = multiprocessing.get_context("forkserver")
    bert = "transformers.models.bert.modeling_bert"
    context.set_forkserver_preload(["tests.choosing.test_checkpoints", "transformers.models.auto.modeling_auto", bert])

    def begin(name: str) -> multiprocessing.Process:
        given = (panel.base.name, folders, dict(panel.texts), str(tmp_path / name / "out"))
        process = context.Process(target=start, args=given)
        process.start()
        return process

    killed = begin("killed")
    root = checkpoint_root(tmp_path / "killed" / "out")
    wanted, waited = 8, time.monotonic() + 120  # in the midst of the repair
    while killed.is_alive() and not (root / f"checkpoint-{wanted}").exists() and time.monotonic() < waited:
        time.sleep(0.002)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and root.exists()
    for name in ("killed", "straight"):
        process = begin(name)
        process.join(120)
        assert process.exitcode == 0
    assert contents(tmp_path / "killed" / "out") == contents(tmp_path / "straight" / "out")
    assert not root.exists()
