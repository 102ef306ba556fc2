"""Where batches of units run: in this process, in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from plait.errors import EnvironmentFault, RunError
from plait.study.spec import Study, parse_study
from plait.study.units import Layout, Unit, pending
from plait.study.work import do

RETRIES = 3
Told = Callable[[str], None]


class Executor(Protocol):
    """Runs batches; each is a JSON object that `run_batch` understands, and everything a batch leaves is on disk."""

    workers: int

    def run(self, batches: Sequence[dict[str, Any]], tell: Told) -> None:
        """Do all batches, in any order; a batch whose worker is lost is done again, since its results are whole or absent.

        Raises:
            RunError: A batch failed on every try.
        """


def batch_of(study: Study, out: Path, units: Sequence[Unit], until: float | None = None) -> dict[str, Any]:
    """A batch as JSON: the study, the folder, the units, and the time (epoch seconds) after which none is begun."""
    listed = [u.to_json() for u in units]
    return {
        "schema": 1,
        "study": study.model_dump(mode="json"),
        "out": str(out.absolute()),
        "units": listed,
        "until": until,
    }


def run_batch(batch: dict[str, Any], layout: Layout | None = None, tell: Told = lambda text: None) -> int:
    """Do the units of a batch that are not done yet; returns how many that were."""
    layout = layout or Layout(parse_study(batch["study"], "batch"), Path(batch["out"]))
    units = pending(layout, [Unit(**u) for u in batch["units"]])
    left = None if batch.get("until") is None else time.monotonic() + batch["until"] - time.time()
    return do(units, layout, tell=tell, until=left)


class InProcess:
    """One after another, the base loaded once."""

    workers = 1

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def run(self, batches: Sequence[dict[str, Any]], tell: Told) -> None:
        """Do all batches here."""
        for batch in batches:
            run_batch(batch, self.layout, tell)


class Processes:
    """One process a worker; worker i sees GPU i alone, where there are GPUs."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, batches: Sequence[dict[str, Any]], tell: Told) -> None:
        """Do all batches, as many at once as there are workers."""
        waiting = [(batch, 0) for batch in batches]
        running: dict[int, tuple[subprocess.Popen[bytes], dict[str, Any], int]] = {}
        try:
            while waiting or running:
                for slot in [s for s in range(self.workers) if s not in running and waiting]:
                    batch, tries = waiting.pop(0)
                    running[slot] = (_start(slot, batch), batch, tries)
                for slot, (process, batch, tries) in list(running.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    del running[slot]
                    if code:
                        waiting.append((batch, _next_try(code, tries, tell)))
                time.sleep(0.05)
        finally:
            for process, _, _ in running.values():
                process.terminate()


def _start(slot: int, batch: dict[str, Any]) -> subprocess.Popen[bytes]:
    import torch

    environment = dict(os.environ)
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
    process = subprocess.Popen(
        [sys.executable, "-m", "plait", "job", "run", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
    )
    assert process.stdin is not None  # asked for above
    process.stdin.write(json.dumps(batch).encode())
    process.stdin.close()
    return process


def _next_try(code: int, tries: int, tell: Told) -> int:
    """Tries so far of a batch whose worker ended with a code: killed workers are replaced, errors are not repeated."""
    if code > 0 or tries + 1 >= RETRIES:
        raise RunError(f"a worker ended with code {code}", hint="its message stands above")
    tell(f"a worker was lost (signal {-code}); its batch is done again")
    return tries + 1


class RayCluster:
    """A Ray cluster whose nodes share the study's folder (and the base and the data, under the same paths).

    Args:
        workers: Batches at once; by default one per GPU of the cluster, or per CPU where it has none.
        address: Of the cluster; None starts or finds a local one.
        gpus: GPUs a batch takes.
    """

    def __init__(self, workers: int | None = None, address: str | None = None, gpus: float = 1.0) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise EnvironmentFault("the package 'ray' is not installed", hint="pip install 'plait[ray]'") from None
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        found = ray.cluster_resources()
        self.gpus = gpus if found.get("GPU") else 0.0
        self.workers = workers or max(1, int(found["GPU"] / gpus if self.gpus else found.get("CPU", 1)))

    def run(self, batches: Sequence[dict[str, Any]], tell: Told) -> None:
        """Do all batches; Ray retries those whose worker or node is lost."""
        import ray

        remote = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=RETRIES)(run_batch)
        waiting = [remote.remote(batch) for batch in batches]
        while waiting:
            ready, waiting = ray.wait(waiting)
            try:
                ray.get(ready)
            except ray.exceptions.RayError as e:
                raise RunError(f"a batch failed: {str(e).strip().splitlines()[-1]}") from e
            tell(f"{len(waiting)} batches left")


def executor_of(name: str, layout: Layout, workers: int | None) -> Executor:
    """An executor by its name: serial, processes or ray."""
    if name == "serial":
        return InProcess(layout)
    return Processes(workers or 2) if name == "processes" else RayCluster(workers)
