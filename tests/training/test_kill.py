"""Killed at any moment and started again, training ends in the same bits."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from plait.adapters.peft_format import read_adapter
from plait.disk.store import identity
from plait.model.base import BaseModel
from plait.training import Member, TrainingSettings, train_adapter, train_fleet
from tests.tiny import make_adapter, make_examples, make_task

SETTINGS = TrainingSettings(steps=60, lr=1e-2, batch_size=8, max_length=24, checkpoint_every=3, dropout=0.1)


def run(kind: str, folder: str, out: str) -> None:
    """One start of the training, in a process of its own."""
    torch.set_num_threads(1)
    base, task = BaseModel(folder, device="cpu"), make_task()
    settings = SETTINGS if kind == "solo" else dataclasses.replace(SETTINGS, dropout=0.0)
    members = [
        Member(
            make_adapter(base, task, "bert"), task, make_examples(task), settings, seed, Path(out) / str(seed),
            identity("train", {"kind": kind}, seed=seed),
        )
        for seed in range(2)
    ]  # fmt: skip
    if kind == "fleet":
        train_fleet(members, base)
        return
    m = members[0]
    train_adapter(m.initial, m.task, m.examples, base, m.settings, seed=0, out=m.out, identity=m.identity)


def kill_until_done(context, kind: str, folder: str, out: Path, kills: int, seed: int) -> int:
    """Kill `kills` starts at random moments, then let one finish; returns how many were caught alive."""
    rng, caught, longest = random.Random(seed), 0, 3.0
    for _ in range(kills):
        process = context.Process(target=run, args=(kind, folder, str(out)))
        process.start()
        started = time.monotonic()
        process.join(rng.uniform(0.2, longest))
        process.kill()  # nothing happens where it has ended, also where it ended a moment ago
        process.join()
        if process.exitcode == -signal.SIGKILL:
            caught += 1
        else:
            longest = max(0.3, 0.8 * (time.monotonic() - started))
            assert process.exitcode == 0
            for path in out.glob("[0-9]*"):
                path.rename(out / f"done-{path.name}-{time.monotonic_ns()}")
    process = context.Process(target=run, args=(kind, folder, str(out)))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    return caught


def check(tiny_base, tmp_path, kind: str, kills: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.training.test_kill", "plait.training.trainer", "plait.training.callbacks", "peft"]
    )
    folder = tiny_base("bert").name
    straight = context.Process(target=run, args=(kind, folder, str(tmp_path / "straight")))
    straight.start()
    straight.join(240)
    assert straight.exitcode == 0
    (tmp_path / "killed").mkdir()
    caught = kill_until_done(context, kind, folder, tmp_path / "killed", kills, seed=kills)
    assert caught >= kills // 3
    for seed in range(1 if kind == "solo" else 2):
        expected = read_adapter(tmp_path / "straight" / str(seed), name="topic")
        for path in [tmp_path / "killed" / str(seed), *(tmp_path / "killed").glob(f"done-{seed}-*")]:
            same_bits(expected, read_adapter(path, name="topic"))
    assert not list((tmp_path / "killed").glob(".*checkpoints"))


def same_bits(a, b):
    for name, f in a.modules.items():
        assert torch.equal(f.A, b.modules[name].A) and torch.equal(f.B, b.modules[name].B), name
    for name, tensor in a.heads["topic"].items():
        assert torch.equal(tensor, b.heads["topic"][name]), name


@pytest.mark.parametrize("kind", ["solo", "fleet"])
def test_killed_three_times(tiny_base, tmp_path, kind):
    check(tiny_base, tmp_path, kind, 3)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", ["solo", "fleet"])
def test_killed_fifty_times(tiny_base, tmp_path, kind):
    check(tiny_base, tmp_path, kind, 50)
