"""A fleet's members end where solo training brings them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from plait.store import identity
from plait.training import Member, TrainingSettings, train_adapter, train_fleet
from tests.tiny import ARCHITECTURES
from tests.training.conftest import make_adapter, make_examples, make_task

SETTINGS = TrainingSettings(steps=20, lr=5e-3, batch_size=8, max_length=24)


def member(base, architecture, out, task=None, seed=0, rank=4, statistics=None, **changes):
    task = task or make_task()
    settings = dataclasses.replace(SETTINGS, **changes)
    return Member(
        make_adapter(base, task, architecture, rank, seed), task, make_examples(task, seed=seed), settings, seed, out,
        identity("train", {"settings": dataclasses.asdict(settings)}, seed=seed), statistics,
    )  # fmt: skip


def alone(m, base, out):
    return train_adapter(
        m.initial,
        m.task,
        m.examples,
        base,
        m.settings,
        seed=m.seed,
        out=out,
        identity=m.identity,
        statistics=m.statistics,
    )


def distance(a, b):
    """Largest relative difference of deltas and head tensors."""
    worst = 0.0
    for name, f in a.modules.items():
        x, y = f.delta(), b.modules[name].delta()
        worst = max(worst, float((x - y).norm() / y.norm().clamp(min=1e-12)))
        worst = max(worst, float((f.A - b.modules[name].A).norm() / b.modules[name].A.norm()))
    for name, tensor in a.heads.get(a.name, {}).items():
        other = b.heads[b.name][name]
        worst = max(worst, float((tensor - other).norm() / other.norm().clamp(min=1e-12)))
    return worst


def compare(members, base, tmp_path, tolerance=1e-4, **options):
    fleet = train_fleet(members, base, **options)
    for i, (m, trained) in enumerate(zip(members, fleet, strict=True)):
        assert distance(trained, alone(m, base, tmp_path / f"alone{i}")) < tolerance, i
    return fleet


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_classification_and_regression_members(tiny_base, tmp_path, architecture):
    base = tiny_base(architecture)
    members = [
        member(base, architecture, tmp_path / "a"),
        member(base, architecture, tmp_path / "b", make_task("three", classes=3), seed=1, lr=2e-3, rank=2),
        member(base, architecture, tmp_path / "c", make_task("value", "regression"), seed=2, head_lr=1e-3),
        member(base, architecture, tmp_path / "d", seed=3, weight_decay=0.1, max_grad_norm=0.05, warmup_ratio=0.2),
    ]
    fleet = compare(members, base, tmp_path)
    assert [a.name for a in fleet] == ["topic", "three", "value", "topic"]
    assert not torch.equal(
        fleet[0].modules[next(iter(fleet[0].modules))].B, fleet[3].modules[next(iter(fleet[3].modules))].B
    )


@pytest.mark.parametrize(("kind", "architecture"), [("causal", "llama"), ("causal", "gpt2"), ("seq2seq", "t5")])
def test_text_members(tiny_base, tmp_path, kind, architecture):
    base = tiny_base(architecture)
    members = [member(base, architecture, tmp_path / str(s), make_task(f"t{s}", kind), seed=s) for s in range(3)]
    compare(members, base, tmp_path)
