"""Two processes train the adapter that one trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.adapters.peft_format import read_adapter
from plait.base import load_task_model, load_tokenizer
from plait.statistics import collect_statistics, write_statistics
from plait.tasks import batches, encode
from tests.training import ddp_worker
from tests.training.conftest import make_examples, make_task

ROOT = Path(__file__).parents[2]


@pytest.fixture
def statistics_folder(tiny_base, tmp_path):
    base = tiny_base("bert")
    tokenizer = load_tokenizer(base)
    for i, name in enumerate(("topic", "other")):
        task = make_task(name)
        rows = encode(tokenizer, task, make_examples(task, 40, seed=10 + i), 24)
        found = collect_statistics(load_task_model(base, task, seed=0), batches(tokenizer, rows, 8), ("query", "value"))
        (tmp_path / "statistics").mkdir(exist_ok=True)
        write_statistics(tmp_path / "statistics" / name, found)
    return tmp_path / "statistics"


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("free", "frozen", "projected")]


@pytest.mark.parametrize("constraint", ["penalised", *SLOW])
def test_two_gloo_processes_equal_one(tiny_base, tmp_path, statistics_folder, constraint):
    folder = tiny_base("bert").name
    worker = [str(Path(ddp_worker.__file__)), folder, str(statistics_folder), str(tmp_path / "two"), constraint]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *worker]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(launch, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ddp_worker.main(folder, str(statistics_folder), str(tmp_path / "one"), constraint)
    one, two = (read_adapter(tmp_path / n, name="topic") for n in ("one", "two"))
    for name, f in one.modules.items():
        x, y = f.delta(), two.modules[name].delta()
        assert (x - y).norm() < 1e-4 * y.norm(), name
    for name, tensor in one.heads["topic"].items():
        assert (tensor - two.heads["topic"][name]).norm() < 1e-4 * tensor.norm(), name
    assert not list(tmp_path.glob(".*checkpoints"))
