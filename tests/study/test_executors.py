"""Where units run does not matter: worker processes and a Ray cluster, some of them killed, give the same table, to rounding."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from plait.errors import EnvironmentFault, Terminated, UsageError
from plait.report.table import rows_of
from plait.runs import executors
from plait.runs.executors import InProcess, Processes, RayCluster, executor_of, gpu_of
from plait.runs.layout import Layout
from plait.runs.reporting import Report
from plait.runs.run import run


def rows(study, out, executor, layout=None):
    """The table of a study run by an executor."""
    layout = layout or Layout(study, out)
    assert run(study, out, executor=executor, layout=layout, quiet=True).finished
    return rows_of(layout)


def ancestors(pid):
    """A process's parents up to the first, so that no cluster but the test's own loses a worker."""
    found = []
    while pid > 1:
        status = Path(f"/proc/{pid}/status")
        if not status.exists():
            break
        pid = int(re.search(r"PPid:\s+(\d+)", status.read_text())[1])
        found.append(pid)
    return found


def killed_at_work(pid):
    """Kill a Ray worker if it is in the middle of a batch: stopped first, so that it cannot end the batch meanwhile."""
    try:
        os.kill(pid, signal.SIGSTOP)
        at_work = Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_run_batch_at")
        os.kill(pid, signal.SIGKILL if at_work else signal.SIGCONT)
    except (ProcessLookupError, FileNotFoundError):
        return False
    return at_work


def require_equal(study, out, found):
    """The same rows as those of one process, to the rounding by which fleets of other company differ."""
    layout = Layout(study, out)
    wanted = rows(study, out, InProcess(layout), layout)
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert (one.arm, one.method, one.seed, one.lr, one.step) == (
            other.arm,
            other.method,
            other.seed,
            other.lr,
            other.step,
        )
        assert one.scales == pytest.approx(other.scales) and one.edge == other.edge
        for name in ("merged", "individual", "floor", "plain", "recovered"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4, abs=1e-3)


@pytest.mark.slow
def test_workers_of_which_one_is_killed_give_the_same_table(small_study, tmp_path):
    study, workers, killed = small_study(), Processes(2), []

    def kill():
        while not workers._alive:
            time.sleep(0.05)
        time.sleep(4)
        killed.append(next(iter(workers._alive.values())))
        killed[0].send_signal(signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    found = rows(study, tmp_path / "processes", workers)
    workers.close()
    assert killed and killed[0].returncode == -signal.SIGKILL
    assert killed[0].stdin.closed and killed[0].stdout.closed
    require_equal(study, tmp_path / "serial", found)


def test_workers_end_with_a_run_that_is_told_to_alone(monkeypatch):
    """A scheduler's signal reaches the run and not its workers, one of which would go on with its batch for hours."""
    started = []

    def busy(slot):
        started.append(
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdin=-1, stdout=-1, text=True)
        )
        return started[-1]

    def told(number, frame):
        raise Terminated

    monkeypatch.setattr(executors, "_start", busy)
    before = signal.signal(signal.SIGUSR1, told)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    workers, begun = Processes(2), time.monotonic()
    try:
        with pytest.raises(Terminated):
            workers.run([{}, {}, {}], Report())
        workers.close()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - begun < 30
    assert [w.returncode for w in started] == [-signal.SIGTERM] * 2  # and no third: what was lost is not done again


@pytest.mark.slow
def test_more_processes_score_than_train(small_study, tmp_path, monkeypatch):
    asked = []
    run = Processes.run
    monkeypatch.setattr(
        Processes, "run", lambda self, batches, tell: (asked.append(len(batches)), run(self, batches, tell))[1]
    )
    workers = Processes(1, scorers=3)
    found = rows(small_study(), tmp_path / "processes", workers)
    workers.close()
    assert max(asked) > 3 and asked.count(1) >= 2  # scores in more batches than processes, fleets whole
    require_equal(small_study(), tmp_path / "serial", found)


def test_scorers_belong_to_processes(small_study, tmp_path):
    with pytest.raises(UsageError, match="scorers"):
        executor_of("serial", Layout(small_study(), tmp_path), None, 2)


def test_58_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentFault, match="'ray' is not installed") as raised:
        RayCluster(2)
    assert raised.value.hint == "pip install 'plait[ray]'"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_ray_nodes_with_a_killed_worker_give_the_same_table(small_study, tmp_path):
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    assert len({n["NodeID"] for n in ray.nodes() if n["Alive"]}) == 2
    killed, nodes, over = [], set(), threading.Event()

    def kill():
        while not over.wait(0.2):
            listed = subprocess.run(["pgrep", "-f", "ray::_run_batch_at"], capture_output=True, text=True, check=False)
            ours = {int(p): above for p in listed.stdout.split() if os.getpid() in (above := ancestors(int(p)))}
            nodes.update(above[0] for above in ours.values())  # a worker's parent is its node's raylet
            if ours and not killed and not over.wait(1) and killed_at_work(next(iter(ours))):
                killed.append(next(iter(ours)))

    watch = threading.Thread(target=kill, daemon=True)
    try:
        watch.start()
        found = rows(small_study(), tmp_path / "ray", RayCluster(2))
    finally:
        over.set()
        watch.join()
        ray.shutdown()
        cluster.shutdown()
    assert killed and len(nodes) == 2
    require_equal(small_study(), tmp_path / "serial", found)


@pytest.mark.parametrize(
    ("slot", "count", "visible", "seen"),
    [
        (1, 4, None, "1"),
        (5, 4, None, "1"),
        (0, 1, "3", "3"),
        (3, 2, "2,3", "3"),
        (1, 2, "GPU-aa, GPU-bb", "GPU-bb"),
        (0, 1, "", "0"),
    ],
)
def test_a_worker_sees_one_of_the_gpus_this_process_may_use(
    slot: int, count: int, visible: str | None, seen: str
) -> None:
    assert gpu_of(slot, count, visible) == seen
