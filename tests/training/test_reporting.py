"""What a run tells others: trackers, progress, and a moved adapter's B fitted again."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch

from plait.adapters.lora import LoraFactors
from plait.errors import EnvironmentFault, UsageError
from plait.training import TrainingSettings, train_adapter
from tests.tiny import make_adapter, make_examples, make_task

SETTINGS = TrainingSettings(steps=20, lr=1e-2, batch_size=8, max_length=24)


def trained(base, start, out, **options):
    from dataclasses import replace

    task = make_task()
    progress = options.pop("progress", None)
    return train_adapter(
        start, task, make_examples(task), base, replace(SETTINGS, **options),
        seed=0, out=out, identity={"schema": 1, "out": str(out)}, progress=progress,
    )  # fmt: skip


@pytest.fixture
def tensorboard(monkeypatch):
    """A stand-in for the package, which the Trainer's own callback writes to: (folder, name, value, step)."""
    written = []

    class SummaryWriter:
        def __init__(self, log_dir=None):
            self.folder = log_dir

        def add_text(self, *_, **__): ...
        def add_hparams(self, *_, **__): ...
        def flush(self): ...
        def close(self): ...

        def add_scalar(self, name, value, step):
            written.append((self.folder, name, value, step))

    module = types.ModuleType("tensorboardX")
    module.SummaryWriter, module.__spec__ = SummaryWriter, importlib.machinery.ModuleSpec("tensorboardX", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return written


def test_losses_go_to_a_tracker_into_a_folder_that_stays(tiny_base, tmp_path, tensorboard):
    base = tiny_base("bert")
    start = make_adapter(base, make_task(), "bert")
    trained(base, start, tmp_path / "topic", report_to=("tensorboard",))
    losses = [(step, value) for _, name, value, step in tensorboard if name == "train/loss"]
    assert [s for s, _ in losses] == list(range(1, 21)) and losses[-1][1] < losses[0][1]
    assert {folder for folder, *_ in tensorboard} == {str(tmp_path / "topic.runs")}


@pytest.mark.parametrize(
    ("trackers", "error", "message"),
    [
        ("tensorboard", UsageError, "expected a list of trackers"),
        (("tensorbord",), UsageError, "unknown tracker 'tensorbord'"),
        (("neptune",), EnvironmentFault, "neptune is not installed"),
    ],
)
def test_58_trackers_that_cannot_be_told(tiny_base, tmp_path, monkeypatch, trackers, error, message):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_neptune_available", lambda: False)
    base = tiny_base("bert")
    with pytest.raises(error, match=message):
        trained(base, make_adapter(base, make_task(), "bert"), tmp_path / "topic", report_to=trackers)
    assert list(tmp_path.iterdir()) == []


def test_progress_tells_every_step_and_the_loss(tiny_base, tmp_path):
    base, seen = tiny_base("bert"), []
    trained(base, make_adapter(base, make_task(), "bert"), tmp_path / "a", progress=lambda *x: seen.append(x))
    assert [(s, n) for s, n, _ in seen] == [(i, 20) for i in range(1, 21)]
    assert seen[-1][2] < seen[1][2]


def test_a_moved_adapter_is_fitted_again_with_a_frozen_a(tiny_base, tmp_path):
    from dataclasses import replace

    from plait.disk.store import read_manifest

    base = tiny_base("bert")
    before = trained(base, make_adapter(base, make_task(), "bert"), tmp_path / "before")
    moved = replace(
        before, modules={n: LoraFactors(f.A.flip(0), f.B * 0.3, f.scaling) for n, f in before.modules.items()}
    )
    after = trained(base, moved, tmp_path / "after", constraint="frozen")
    for name, f in moved.modules.items():
        assert torch.equal(after.modules[name].A, f.A) and not torch.equal(after.modules[name].B, f.B)
    losses = read_manifest(tmp_path / "after")["result"]["losses"]
    assert losses["last"] < losses["first"]
