"""Where batches of units run: in this process, in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from plait.border.checked import Json
from plait.border.counts import agreed
from plait.disk.store import discard
from plait.errors import EnvironmentFault, PlaitError, RunError, UsageError
from plait.recipes.recipe_file import parse_recipe
from plait.runs.folder import is_begun
from plait.runs.layout import Layout, Mend
from plait.runs.pending import pending
from plait.runs.reporting import Lines, Report
from plait.runs.stages import do
from plait.runs.units import Unit

RETRIES = 3
SAFE_PATH = {"PYTHONSAFEPATH": "1"}  # no child, nor a child of one, imports from the working directory


class Executor(Protocol):
    """Runs batches; each is a JSON object that `run_batch` understands, and everything a batch leaves is on disk.

    `workers` batches of trainings run at once, or `scorers` of anything else: what scores waits for Python more than for the GPU.
    """

    workers: int
    scorers: int

    def run(self, batches: Sequence[dict[str, Any]], report: Report) -> None:
        """Do all batches, in any order; a batch whose worker is lost is done again, since its results are whole or absent.

        Raises:
            RunError: A batch failed on every try.
        """

    def close(self) -> None:
        """Let go of what is held."""


def batch_of(layout: Layout, units: Sequence[Unit], until: float | None = None) -> Json:
    """A batch as JSON: the recipe, the folder, the units, and the time (epoch seconds) after which none is begun."""
    return {
        "schema": 1,
        "study": layout.recipe.model_dump(mode="json"),
        "out": str(layout.out.absolute()),
        "units": [u.to_json() for u in units],
        "until": until,
        "overwrite": layout.overwrite,
    }


def layout_of(batch: Mapping[str, Any]) -> Layout:
    """The layout that a batch speaks of."""
    recipe = parse_recipe(batch["study"], "batch")
    return Layout(recipe, Path(batch["out"]), overwrite=bool(batch.get("overwrite", False)))


def run_batch(batch: Mapping[str, Any], layout: Layout | None = None, report: Report | None = None) -> int:
    """Do the units of a batch that are not done yet; returns how many that were."""
    layout, report = layout or layout_of(batch), report or Report()
    layout.mend = layout.mend or (mender(report) if is_begun(layout.out) else None)
    units = pending(layout, [Unit(**u) for u in batch["units"]])
    left = None if batch.get("until") is None else time.monotonic() + batch["until"] - time.time()
    done = do(units, layout, report=report, until=left)
    release_memory()  # to others at work on the device
    return done


def _run_batch_at(folder: str, batch: dict[str, Any]) -> int:
    """`run_batch` with relative paths read from where it was started, where that folder is on this machine too."""
    if Path(folder).is_dir():
        os.chdir(folder)
    return run_batch(batch)


def mender(report: Report) -> Mend:
    """What clears a damaged result away and says so."""

    def mend(path: Path, fault: PlaitError) -> None:
        discard(path)
        report.note(f"done again: {fault}")

    return mend


def release_memory() -> None:
    """Give the device what the allocator keeps and nothing uses."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class InProcess:
    """One after another, the base loaded once."""

    workers = scorers = 1

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def run(self, batches: Sequence[dict[str, Any]], report: Report) -> None:
        """Do all batches here."""
        for batch in batches:
            run_batch(batch, self.layout, report)

    def close(self) -> None:
        """Nothing is held."""


class Processes:
    """One process a worker, alive from wave to wave with the base loaded; worker i sees GPU i alone, where there are GPUs."""

    def __init__(self, workers: int, scorers: int | None = None) -> None:
        self.workers = workers
        self.scorers = scorers or workers
        self._alive: dict[int, subprocess.Popen[str]] = {}
        self._leaving = False

    def run(self, batches: Sequence[dict[str, Any]], report: Report) -> None:
        """Do all batches, as many at once as there are workers or scorers, whichever are more."""
        waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        for batch in batches:
            waiting.put(batch)
        slots = min(max(self.workers, self.scorers), len(batches))
        with ThreadPoolExecutor(slots) as pool:
            try:
                for future in [pool.submit(self._serve, slot, waiting, report) for slot in range(slots)]:
                    future.result()
            except KeyboardInterrupt:  # sent to this process alone, the workers do not hear of it
                self._leaving = True
                for worker in list(self._alive.values()):
                    worker.terminate()
                raise

    def _serve(self, slot: int, waiting: queue.SimpleQueue[dict[str, Any]], report: Report) -> None:
        """Give a worker batches until none is left; a killed worker is replaced, an error is not repeated."""
        with contextlib.suppress(queue.Empty):
            while not self._leaving:
                batch = waiting.get_nowait()
                for attempt in range(RETRIES + 1):
                    code = self._ask(slot, batch)
                    if code is None or self._leaving:
                        break
                    if code > 0 or attempt == RETRIES:
                        raise RunError(f"a worker ended with code {code}", hint="its message stands above")
                    report.note(f"a worker was lost (signal {-code}); its batch is done again")

    def _ask(self, slot: int, batch: dict[str, Any]) -> int | None:
        """Have a worker do one batch; None, or the exit code with which it ended instead."""
        if slot not in self._alive:
            self._alive[slot] = _start(slot)
        worker = self._alive[slot]
        if worker.stdin is None or worker.stdout is None:
            raise RunError("a worker without pipes")
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(json.dumps(batch) + "\n")
            worker.stdin.flush()
            if worker.stdout.readline():
                return None
        del self._alive[slot]
        return _ended(worker)

    def close(self) -> None:
        """Let the workers go."""
        for worker in self._alive.values():
            _ended(worker)
        self._alive.clear()


def _ended(worker: subprocess.Popen[str]) -> int:
    """The exit code of a worker that gets no more batches; its pipes are closed, also where it was killed."""
    with contextlib.suppress(BrokenPipeError):  # of a line that a killed worker did not take
        if worker.stdin is not None:
            worker.stdin.close()
    code = worker.wait()
    if worker.stdout is not None:
        worker.stdout.close()
    return code


def _start(slot: int) -> subprocess.Popen[str]:
    import torch

    environment = {**os.environ, **SAFE_PATH}
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = gpu_of(
            slot, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        )
    command = [sys.executable, "-P", "-m", "plait.cli.worker"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)


def gpu_of(slot: int, count: int, visible: str | None) -> str:
    """What a worker may see: one of the `count` GPUs this process sees, by the name it has among `visible` ones."""
    names = [n.strip() for n in visible.split(",")] if visible else []
    index = slot % count
    return names[index] if index < len(names) else str(index)


def serve(batches: Iterable[str], answer: Callable[[str], None], tell: Callable[[str], None]) -> None:
    """Do batches as they come, one JSON line each, answering each with a line; the base stays loaded between them."""
    layout: Layout | None = None
    for line in batches:
        batch = json.loads(line)
        asked = layout_of(batch)
        if layout is None or (layout.recipe, layout.out) != (asked.recipe, asked.out):
            layout = asked
        answer(json.dumps({"done": run_batch(batch, layout, Lines(tell))}))


class RayCluster:
    """A Ray cluster whose nodes share the run's folder (and the base and the data, under the same paths).

    Args:
        workers: Batches at once; by default one per GPU of the cluster, or per CPU where it has none.
    """

    def __init__(self, workers: int | None = None) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise EnvironmentFault("the package 'ray' is not installed", hint="pip install 'plait[ray]'") from None
        if not ray.is_initialized():
            with contextlib.chdir(Path(__file__).parents[2]):  # Ray has its workers import from where it was started
                ray.init(log_to_driver=False)
        found = ray.cluster_resources()
        self.gpus = 1.0 if found.get("GPU") else 0.0
        self.workers = workers or max(1, int(found["GPU"] if self.gpus else found.get("CPU", 1)))
        self.scorers = self.workers

    def run(self, batches: Sequence[dict[str, Any]], report: Report) -> None:
        """Do all batches; Ray retries those whose worker or node is lost."""
        import ray

        remote = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=RETRIES)(_run_batch_at)
        waiting = [remote.remote(str(Path.cwd()), batch) for batch in batches]
        while waiting:
            ready, waiting = ray.wait(waiting)
            try:
                ray.get(ready)
            except ray.exceptions.RayError as e:
                raise RunError(f"a batch failed: {str(e).strip().splitlines()[-1]}") from e
            report.begin(f"{len(waiting)} {agreed(len(waiting), 'batch', 'batches')} left", 0.0, 0)

    def close(self) -> None:
        """The cluster is not ours to stop."""


def executor_of(name: str, layout: Layout, workers: int | None, scorers: int | None = None) -> Executor:
    """An executor by its name: serial, processes or ray.

    Raises:
        UsageError: Scorers, which are processes of this machine, of another executor.
    """
    if scorers is not None and name != "processes":
        raise UsageError(f"scorers have no meaning with the executor {name!r}", hint="they go with processes")
    if name == "serial":
        return InProcess(layout)
    return Processes(workers or 2, scorers) if name == "processes" else RayCluster(workers)
