"""EMR with masks: what each task gets back."""

from __future__ import annotations

import pytest
import torch
from tests.merging.test_folders import saved
from tests.reference import merging as twin
from torch import nn

from plait.adapters.peft_format import read_adapter
from plait.errors import Damaged, InputError, UsageError
from plait.merging.per_task import TaskSwitch, load_task, merge_per_task


def test_tasks_come_back_better_than_the_unified_delta(tmp_path):
    folders = [saved(tmp_path / n, i) for i, n in enumerate("abc")]
    done = merge_per_task(folders, tmp_path / "out", rank=16)
    assert done.record.rescalers.keys() == {"a", "b", "c"} and done.record.loss.discarded_energy < 1e-6
    unified = read_adapter(tmp_path / "out", name="unified")
    for task in "abc":
        deltas, own = load_task(tmp_path / "out", task), read_adapter(tmp_path / task)
        found = torch.cat([d.dense().dense().flatten() for d in deltas.values()])
        wanted = torch.cat([own.modules[m].delta().flatten() for m in deltas])
        plain = torch.cat([unified.modules[m].delta().flatten() for m in deltas])
        assert found.abs().sum() == pytest.approx(float(wanted.abs().sum()), rel=1e-4)
        error = float((found - wanted).norm() / wanted.norm())
        assert error == pytest.approx(done.record.relative_error[task], rel=1e-3)
        assert error < 0.7 * float((plain - wanted).norm() / wanted.norm())


def test_masks_and_rescalers_are_the_papers(tmp_path):
    folders = [saved(tmp_path / n, i) for i, n in enumerate("ab")]
    done = merge_per_task(folders, tmp_path / "out", rank=16)
    own = [read_adapter(f) for f in folders]
    masses = {n: [0.0, 0.0] for n in "ab"}
    for module in own[0].modules:
        deltas = [a.modules[module].delta(torch.float64).numpy() for a in own]
        unified = twin.emr(deltas, [1.0, 1.0])
        for n, d in zip("ab", deltas, strict=True):
            masses[n][0] += abs(d).sum()
            masses[n][1] += abs(unified * (d * unified > 0)).sum()
    assert done.record.rescalers == pytest.approx({n: a / b for n, (a, b) in masses.items()}, rel=1e-4)


def test_switching_a_model_between_tasks(tmp_path):
    folders = [saved(tmp_path / n, i, targets=("q",)) for i, n in enumerate("ab")]
    merge_per_task(folders, tmp_path / "out")
    layer = nn.ModuleDict({"q": nn.Linear(16, 24)})
    model = nn.ModuleDict({"layers": nn.ModuleList([layer, nn.ModuleDict({"q": nn.Linear(16, 24)})])})
    before = layer["q"].weight.detach().clone()
    switch = TaskSwitch(model, tmp_path / "out")
    for task in ("a", "b", None):
        switch.apply(task)
        delta = load_task(tmp_path / "out", task)["layers.0.q"].dense().dense() if task else 0.0
        torch.testing.assert_close(
            layer["q"].weight.detach() - before, torch.zeros_like(before) + delta, atol=1e-5, rtol=1e-4
        )


def test_what_is_missing_is_named(tmp_path):
    merge_per_task([saved(tmp_path / n, i) for i, n in enumerate("ab")], tmp_path / "out")
    with pytest.raises(UsageError, match=r"no task 'c'.*a, b"):
        load_task(tmp_path / "out", "c")
    with pytest.raises(InputError, match="not a per-task merge"):
        load_task(tmp_path / "a", "a")


@pytest.mark.parametrize("file", ["masks/a.safetensors", "masks/b.safetensors", "adapter_model.safetensors"])
def test_a_flipped_bit_is_noticed(tmp_path, file):
    """Also one in the mask of another task: the folder is not what was written."""
    merge_per_task([saved(tmp_path / n, i) for i, n in enumerate("ab")], tmp_path / "out")
    data = bytearray((tmp_path / "out" / file).read_bytes())
    data[-1] ^= 1
    (tmp_path / "out" / file).write_bytes(data)
    with pytest.raises(Damaged, match="not what was written"):
        load_task(tmp_path / "out", "a")
