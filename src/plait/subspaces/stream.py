"""Subspaces of a model too large for its statistics: collected, solved and discarded in groups of layers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from plait.errors import InputError, UsageError
from plait.options import checked_options
from plait.statistics.accumulate import POOLS, exact_matmul
from plait.statistics.collector import Batch, Collector
from plait.statistics.layers import LayerGroup, LayerWalk
from plait.statistics.moments import ModuleInfo, Moments
from plait.statistics.passes import ForwardPasses, first_example
from plait.statistics.sites import find_sites
from plait.statistics.targets import find_targets
from plait.subspaces.compute import Subspace, solve_site
from plait.subspaces.inputs import SiteInputs
from plait.subspaces.registry import SubspaceMethod, checked_row_norm, find_subspace_method

# Sites of up to this width are solved several at a time on a GPU: each alone leaves it waiting for small steps.
_SMALL_SITE, _WORKERS = 6000, 6
DEVICES_WITH_STREAMS = ("cuda",)


@dataclass(frozen=True, slots=True)
class StreamedSubspaces:
    """What one walk through a model gives.

    Args:
        subspaces: Task -> module -> subspace.
        modules: Task -> module -> its shape and output energy, as in `Statistics.modules`.
        prefix: The backbone's attribute.
    """

    subspaces: Mapping[str, Mapping[str, Subspace]]
    modules: Mapping[str, Mapping[str, ModuleInfo]]
    prefix: str


@dataclass(frozen=True, slots=True)
class _Solver:
    method: SubspaceMethod
    options: Mapping[str, Any]
    rank: int
    row_norm: float | None
    seed: int
    device: torch.device

    def solve(self, site: str, moments: Mapping[str, Moments]) -> dict[str, Subspace]:
        width = next(iter(moments.values())).dim
        inputs = SiteInputs(site, width, self.rank, tuple(moments), moments, seed=self.seed, device=self.device)
        return solve_site(self.method, inputs, self.options, self.row_norm)

    def solve_aside(self, site: str, moments: Mapping[str, Moments], ready: Any) -> dict[str, Subspace]:
        """Solve on the calling thread's own stream, after the event `ready`.

        What it returns lies on the CPU, so the stream has finished.
        """
        if self.device.type != "cuda":
            return self.solve(site, moments)
        stream = _stream_of_thread(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            stream.wait_event(ready)
            return self.solve(site, moments)


def stream_subspaces(
    method: str,
    model: nn.Module,
    batches: Mapping[str, Sequence[Batch]],
    target_modules: Sequence[str] | str | None = None,
    *,
    rank: int = 8,
    row_norm: float | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    pool: str = "token",
    group: int = 1,
    device: torch.device | str | None = None,
    observe: Callable[[str, float], None] | None = None,
    **limits: Any,
) -> StreamedSubspaces:
    """Subspaces of all tasks in one walk through the model, without statistics files.

    Each group of layers is run for the batches of all tasks, solved, and let go of: the memory is that of one group's
    moments of all tasks, and the weights may lie on the CPU, in 4 bits, or anywhere: only a group's are on the device.
    The result is that of collecting and computing separately, up to rounding.

    Args:
        method: A registered subspace method that needs moments alone.
        model: The model, as `collect_statistics` takes it; its layers lie in ModuleLists.
        batches: Task -> its batches, all in memory.
        target_modules: PEFT's `target_modules`.
        rank: r.
        row_norm: Length of A's rows.
        options: Options of the method.
        seed: For what is drawn.
        pool: "token" or "mean".
        group: Layers at a time. More need more memory and fewer passes through the model's embedding.
        device: Where to compute; by default where the model is.
        observe: Called with "collect" or "solve" and the seconds it took, after each group (synchronises a GPU). On a GPU
            small sites are solved while the next group is collected: "solve" is then what remained to wait for.
        **limits: `exclude_modules`, `layers_to_transform`, `layers_pattern`.

    Raises:
        UsageError: A method that is drawn without data or reads weights, or a group below 1.
        InputError: Too few tasks or no batches; otherwise as in `collect_statistics`.
    """
    chosen = find_subspace_method(method)
    if "moments" not in chosen.needs or chosen.per_module:
        raise UsageError(
            f"{method} cannot be streamed: it is drawn without data, or reads weights", hint="compute_subspaces"
        )
    if pool not in POOLS or group < 1:
        raise UsageError(f"pool {pool!r} in groups of {group}, expected {' or '.join(POOLS)} and at least 1")
    if len(batches) < 2 or not all(len(b) for b in batches.values()):
        raise InputError("needs the batches of at least two tasks, none of them empty")
    targets, prefix = find_targets(model, target_modules, **limits)
    passes = ForwardPasses(model, device)
    solver = _Solver(chosen, checked_options(chosen, options), rank, checked_row_norm(row_norm), seed, passes.device)
    walk = LayerWalk(passes, targets, group)
    clock = _Clock(observe, passes.device)
    spaces: dict[str, dict[str, Subspace]] = {t: {} for t in batches}
    modules: dict[str, dict[str, ModuleInfo]] = {t: {} for t in batches}
    with passes.quiet(), exact_matmul(), _Jobs(solver, spaces) as jobs:
        for number, part in enumerate(walk.groups):
            last = number == len(walk.groups) - 1
            with clock("collect"):
                sites, readers = _collect_group(walk, part, targets, batches, pool, last, modules)
            with clock("solve"):
                jobs.gather()  # the small sites of the group before, solved while this one was collected
                jobs.give(sites, readers)
        with clock("solve"):
            jobs.gather()
    return StreamedSubspaces({t: {n: spaces[t][n] for n in targets} for t in batches}, modules, prefix)


def _collect_group(
    walk: LayerWalk,
    part: LayerGroup,
    targets: Mapping[str, Any],
    batches: Mapping[str, Sequence[Batch]],
    pool: str,
    last: bool,
    modules: dict[str, dict[str, ModuleInfo]],
) -> tuple[dict[str, dict[str, Moments]], dict[str, list[str]]]:
    """Site -> task -> moments on the device, and site -> modules."""
    inside = {n: targets[n] for n in part.targets}
    sites: dict[str, dict[str, Moments]] = {}
    readers: dict[str, list[str]] = {}
    first = next(iter(batches.values()))[0]
    with walk.group(part) as run:
        site_map = find_sites(walk.passes.model, inside, lambda: run(-1, first_example(first)))
        for name, site in site_map.site_of.items():
            readers.setdefault(site, []).append(name)
        count = 0
        collectors = {}
        for task, given in batches.items():
            collector = Collector(inside, site_map, walk.passes, pool=pool, stop_early=last, dense=True)
            numbers = iter(range(count, count + len(given)))
            collector.consume(given, lambda batch, n=numbers: run(next(n), batch))  # type: ignore[misc]
            count += len(given)
            collectors[task] = collector
        for task, collector in collectors.items():  # a GPU is waited for once, after the last task
            energies, moments = collector.sums_on_device()
            modules[task] |= energies
            for site, inputs in moments.items():
                sites.setdefault(site, {})[task] = inputs
    return sites, readers


class _Jobs:
    """Solving beside collecting: on a GPU small sites go to threads, because each alone leaves it waiting for small steps.

    Large sites, one at a time, and all sites on a CPU are solved at once. The moments of a solved site are let go. The
    threads' small eigen-problems run on one core each: together they would wake every core six times over.
    """

    def __init__(self, solver: _Solver, spaces: dict[str, dict[str, Subspace]]) -> None:
        self.solver, self.spaces = solver, spaces
        self.threads = torch.get_num_threads()
        aside = solver.device.type in DEVICES_WITH_STREAMS
        self.pool = ThreadPoolExecutor(_WORKERS, initializer=torch.set_num_threads, initargs=(1,)) if aside else None
        self.pending: list[tuple[list[str], Future[dict[str, Subspace]]]] = []

    def __enter__(self) -> _Jobs:
        if self.pool is not None:  # torch loads its solvers on first use, which threads must not do together
            torch.linalg.cholesky_ex(torch.eye(2, dtype=torch.float32, device=self.solver.device))
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self.threads)  # what a thread sets for itself, threads to come would take over

    def give(self, sites: dict[str, dict[str, Moments]], readers: Mapping[str, list[str]]) -> None:
        """Take over a group's moments."""
        ready = torch.cuda.current_stream(self.solver.device).record_event() if self._on_gpu() else None
        large = []
        for site in list(sites):
            moments = sites.pop(site)
            if self.pool is not None and next(iter(moments.values())).dim <= _SMALL_SITE:
                self.pending.append((readers[site], self.pool.submit(self.solver.solve_aside, site, moments, ready)))
            else:
                large.append((site, moments))
        while large:
            self.gather()  # the memory of a large site is not shared with others
            site, moments = large.pop(0)
            self._keep(readers[site], self.solver.solve(site, moments))

    def _on_gpu(self) -> bool:
        return self.solver.device.type == "cuda"

    def gather(self) -> None:
        """Wait for what is being solved."""
        for modules, future in self.pending:
            self._keep(modules, future.result())
        self.pending = []

    def _keep(self, modules: list[str], solved: Mapping[str, Subspace]) -> None:
        for task, subspace in solved.items():
            self.spaces[task] |= dict.fromkeys(modules, subspace)


_threads = threading.local()


def _stream_of_thread(device: torch.device) -> Any:
    if not hasattr(_threads, "stream"):
        make: Any = torch.cuda.Stream
        _threads.stream = make(device, priority=-1)  # its small steps go first, the large ones fill the gaps
    return _threads.stream


class _Clock:
    """Seconds of each part, for whoever wants them."""

    def __init__(self, observe: Callable[[str, float], None] | None, device: torch.device) -> None:
        self.observe, self.device = observe, device
        self._part, self._start = "", 0.0

    def __call__(self, part: str) -> _Clock:
        self._part = part
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.observe is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.observe(self._part, time.perf_counter() - self._start)
