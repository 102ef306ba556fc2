"""Two processes train the adapter that one trains, each with the whole base or with half of it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.adapters.peft_format import read_adapter, write_adapter
from plait.errors import UsageError
from plait.model.base import load_task_model, load_tokenizer
from plait.statistics import collect_statistics, write_statistics
from plait.tasks import batches, encode
from plait.training import train_adapter
from tests.conftest import tiny_rows, write_rows
from tests.statistics.test_distributed import LAUNCHERS
from tests.tiny import TARGETS, make_adapter, make_examples, make_task
from tests.training import ddp_worker

ROOT = Path(__file__).parents[2]


@pytest.fixture
def statistics_folder(tiny_base, tmp_path):
    def make(architecture: str) -> Path:
        base, targets = tiny_base(architecture), TARGETS[architecture]
        tokenizer = load_tokenizer(base)
        for i, name in enumerate(("topic", "other")):
            task = make_task(name)
            rows = encode(tokenizer, task, make_examples(task, 40, seed=10 + i), 24)
            found = collect_statistics(load_task_model(base, task, seed=0), batches(tokenizer, rows, 8), targets)
            (tmp_path / "statistics").mkdir(exist_ok=True)
            write_statistics(tmp_path / "statistics" / name, found)
        return tmp_path / "statistics"

    return make


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("free", "frozen", "projected")]
SPLIT = [("penalised", "bert"), *(pytest.param(k, "llama", marks=pytest.mark.slow) for k in ("frozen", "projected"))]


def run_two(*arguments: object) -> None:
    """The worker in two processes."""
    worker = [str(Path(ddp_worker.__file__)), *map(str, arguments)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *worker]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(launch, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def assert_alike(one: Path, two: Path) -> None:
    one, two = (read_adapter(p, name="topic") for p in (one, two))
    for name, f in one.modules.items():
        x, y = f.delta(), two.modules[name].delta()
        assert (x - y).norm() < 1e-4 * y.norm(), name
    for name, tensor in one.heads["topic"].items():
        assert (tensor - two.heads["topic"][name]).norm() < 1e-4 * tensor.norm(), name


@pytest.mark.parametrize("constraint", ["penalised", *SLOW])
def test_two_gloo_processes_equal_one(tiny_base, tmp_path, statistics_folder, constraint):
    folder, statistics = tiny_base("bert").name, statistics_folder("bert")
    run_two(folder, statistics, tmp_path / "two", constraint)
    ddp_worker.main(folder, str(statistics), str(tmp_path / "one"), constraint)
    assert_alike(tmp_path / "one", tmp_path / "two")
    assert not list(tmp_path.glob(".*checkpoints"))


@pytest.mark.parametrize(("constraint", "architecture"), SPLIT)
def test_a_base_split_over_two_processes_trains_the_same_adapter(
    tiny_base, tmp_path, statistics_folder, constraint, architecture
):
    folder, statistics = tiny_base(architecture).name, statistics_folder(architecture)
    run_two(folder, statistics, tmp_path / "two", constraint, "split")
    ddp_worker.main(folder, str(statistics), str(tmp_path / "one"), constraint)
    assert_alike(tmp_path / "one", tmp_path / "two")
    for rank in (0, 1):
        known = json.loads((tmp_path / f"split-{rank}.json").read_text())
        before, after = known["sizes"]
        assert after < 0.7 * before  # half of the base, and the whole adapter
        assert len(known["split"]) == 3 and all(known["split"])  # two blocks, and what is in none
        assert known["outlived"] == []  # a whole weight that another name keeps would stay on the GPU


def test_a_base_is_not_split_over_one_process(tiny_base, tmp_path):
    base, task = tiny_base("bert"), make_task()
    settings = dataclasses.replace(ddp_worker.SETTINGS, shard_base=True)
    with pytest.raises(UsageError, match="there is one"):
        train_adapter(
            make_adapter(base, task, "bert"), task, make_examples(task), base, settings,
            seed=0, out=tmp_path / "a", identity={"schema": 1},
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_line_under_launchers(launcher, tiny_base, tmp_path):
    base, task = tiny_base("bert"), make_task("one")
    (tmp_path / "start").mkdir()
    write_adapter(tmp_path / "start", make_adapter(base, task, "bert"))
    rows = write_rows(tmp_path / "one.csv", tiny_rows(2, 40, seed=0))
    said = ["--base", base.name, "--task", "one", "--train-file", rows, "--text", "text", "--device", "cpu"]
    steps = ["--set", "training.steps=3", "--set", "training.batch_size=4", "--set", "training.shard_base=true"]
    launch = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "plait"]
    command = [*launch, "train", tmp_path / "start", *said, *steps, "--out", tmp_path / "out", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["steps"] == 3  # one process speaks
    assert any(f.B.any() for f in read_adapter(tmp_path / "out").modules.values())
