"""Hooks that add what every site reads to its sums, batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from plait.errors import InputError, RunError
from plait.model.out_of_memory import half_of, split
from plait.statistics.accumulate import SiteSums, means
from plait.statistics.masks import BatchMasks, Positions
from plait.statistics.moments import ModuleInfo, Moments, Statistics
from plait.statistics.passes import Enough, ForwardPasses, examples_in
from plait.statistics.routers import linear_outputs
from plait.statistics.sites import SiteMap, input_of, memory_of
from plait.statistics.targets import Target

Batch = Mapping[str, Tensor]


class Collector:
    """Hooks that add every batch to the sums of the sites.

    Args:
        targets: Modules to collect for.
        places: Their sites.
        passes: How to run a batch.
        pool, sketch: See `collect_statistics`.
        stop_early: End a pass once every module has been called, where each is called once.
        dense: Accumulate dense matrices from the first row (nothing will be written to disk).
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        places: SiteMap,
        passes: ForwardPasses,
        *,
        pool: str,
        sketch: int | None = None,
        stop_early: bool = True,
        dense: bool = False,
    ) -> None:
        self.targets = {n: targets[n] for n in places.site_of}
        self.places, self.passes = places, passes
        self.stops = stop_early and places.once_each
        sizes = {s: targets[s].shape[1] for s in places.sites}
        self.sums = {
            s: SiteSums(d, passes.dtype, passes.device, pool=pool, sketch=sketch, dense=dense) for s, d in sizes.items()
        }
        self.pool = pool
        self.energies = {n: torch.zeros((), dtype=torch.float64, device=passes.device) for n in places.site_of}
        self.samples = self.tokens = self.batch = 0
        self.most: int | None = None  # examples a pass, once memory has run out
        self._halves = sketch is None
        self._calls: Counter[tuple[str, str]] = Counter()  # of the pass that runs
        self._added: set[tuple[str, str, int]] = set()  # sums that have the pass's rows
        self._skipped: frozenset[tuple[str, str, int]] = frozenset()  # sums that have them from a pass that failed
        self._followers = {s: sum(1 for x in places.site_of.values() if x == s) - 1 for s in places.sites}
        self._live: dict[str, list[Tensor]] = {}
        self._awaited: dict[str, int] = {}
        self._pending: set[str] = set()
        self._checks: list[tuple[str, Tensor]] = []  # of the batch that runs
        self._carried: list[tuple[str, Tensor]] = []  # of a pass that failed
        self._unread: tuple[int, list[tuple[str, Tensor]]] = 0, []  # of the batch before, so that no GPU is waited for
        self._masks: BatchMasks | None = None

    def consume(self, batches: Iterable[Batch], run: Callable[[Batch], None] | None = None) -> None:
        """Run all batches; `run` replaces the plain forward pass.

        Where memory runs out in a plain pass, the batch goes on in halves, later ones too (not with a sketch). What the
        failed pass had added to some sites stays added, and its halves pass those by.
        """
        handles = [h for t in self.targets.values() for h in self._hooked(t)]
        try:
            for batch in batches:
                if examples_in(batch) and run is None and self._halves:
                    self._consume_in_parts(batch)
                elif examples_in(batch):
                    self._consume_one(batch, run or self.passes.run)
            self._live.clear()
        finally:
            for handle in handles:
                handle.remove()

    def _consume_in_parts(self, batch: Batch) -> None:
        waiting = [(part, frozenset[tuple[str, str, int]]()) for part in self._parts(batch)]
        while waiting:
            part, self._skipped = waiting.pop(0)
            try:
                self._consume_one(part, self.passes.run)
                continue
            except torch.OutOfMemoryError:
                had = self._skipped | self._added
            self._live.clear()  # outside the handler: the failed pass's frames are gone
            self._carried, self._masks = self._checks, None
            self.most = half_of(examples_in(part), "collected")
            waiting = [(half, had) for half in self._parts(part)] + waiting
        self._skipped = frozenset()

    def _parts(self, batch: Batch) -> list[Batch]:
        size = examples_in(batch)
        return [batch] if self.most is None or size <= self.most else list(split(batch, size, self.most))

    def _is_new(self, kind: str, name: str) -> bool:
        """Whether a sum lacks the rows of this call, which then counts as added once the caller has added them."""
        self._calls[kind, name] += 1
        return (kind, name, self._calls[kind, name]) not in self._skipped

    def _has(self, kind: str, name: str) -> None:
        self._added.add((kind, name, self._calls[kind, name]))

    def _consume_one(self, batch: Batch, run: Callable[[Batch], None]) -> None:
        self._masks = BatchMasks(batch, getattr(self.passes.base, "config", None), self.passes.device)
        self._pending = set(self.targets)
        self._live.clear()
        self._awaited.clear()
        self._calls.clear()
        self._added = set()
        self._checks, self._carried = self._carried, []
        run(batch)
        if self._pending:
            name = sorted(self._pending)[0]
            raise RunError("was not called in this batch, though it was for the first example", where=name)
        self._require_finite()
        self._unread = self.batch, self._checks
        self.batch += 1
        self.samples += examples_in(batch)
        self.tokens += self._masks.tokens() or 0

    def _require_finite(self) -> None:
        batch, checks = self._unread
        if not checks:
            return  # the first batch, or a group of layers without targets
        finite = torch.stack([value for _, value in checks]).isfinite().tolist()
        if not all(finite):
            raise InputError(
                f"reads NaN or infinity in batch {batch}",
                where=checks[finite.index(False)][0],
                hint="a float16 overflow? load the base in bfloat16 or float32",
            )

    def _hooked(self, target: Target) -> Iterator[Any]:
        leads = self.places.site_of[target.name] == target.name
        see = self._lead if leads else self._follow
        yield target.module.register_forward_pre_hook(
            lambda _m, args, kwargs: see(target, input_of(target, args, kwargs)), with_kwargs=True
        )
        if target.is_router:  # what it returns is chosen from, or made into shares
            yield target.module.register_forward_hook(
                lambda m, args, kwargs, _o: self._leave(target, linear_outputs(m, input_of(target, args, kwargs))),
                with_kwargs=True,
            )
        else:
            yield target.module.register_forward_hook(lambda _m, _a, output: self._leave(target, output))

    def _fit(self, name: str, shape: torch.Size) -> Positions:
        assert self._masks is not None  # set before every pass
        return self._masks.fit(shape, self.places.role_of[self.places.site_of[name]], name)

    def _lead(self, target: Target, h: Tensor) -> None:
        if followers := self._followers[target.name]:
            self._live.setdefault(target.name, []).append(h)
            self._awaited[target.name] = self._awaited.get(target.name, 0) + followers
        if self._is_new("site", target.name):
            self._checks.append((target.name, self.sums[target.name].add(h, self._fit(target.name, h.shape))))
            self._has("site", target.name)

    def _follow(self, target: Target, h: Tensor) -> None:
        """Check that the tensor is one the site has counted: sites were places on one example.

        What was counted is kept alive until every follower has been called, so that an address means one tensor.
        """
        site = self.places.site_of[target.name]
        if not any(memory_of(seen) == memory_of(h) for seen in self._live.get(site, [])):
            raise RunError(f"no longer reads what {site!r} reads, as it did for the first example", where=target.name)
        self._awaited[site] -= 1
        if not self._awaited[site]:
            self._live[site].clear()

    def _leave(self, target: Target, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        if self._is_new("energy", target.name):
            self.energies[target.name] += self._energy(target, y)
            self._has("energy", target.name)
        self._pending.discard(target.name)
        if self.stops and not self._pending:
            raise Enough

    def _energy(self, target: Target, y: Tensor) -> Tensor:
        """Summed squared norm of the outputs without bias over the real positions: tr(W0 S W0^T) without W0."""
        y = getattr(y, "to_local", lambda: y)().detach()
        positions = self._fit(target.name, y.shape)
        rows = y.reshape(-1, y.shape[-1])
        if positions.index is not None:
            rows = rows.index_select(0, positions.index)
        if self.pool == "mean":
            rows = means(rows.float(), positions)
        bias, wide = getattr(target.module, "bias", None), torch.promote_types(rows.dtype, torch.float32)
        if isinstance(bias, Tensor):
            rows = rows.to(wide) - bias.detach().to(rows.device, wide)
        norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=wide)
        return norms.double().square().sum()

    def sums_on_device(self) -> tuple[dict[str, ModuleInfo], dict[str, Moments]]:
        """Modules and sites, where they were accumulated; to be called once.

        Raises:
            InputError: NaN or infinity in the last batch.
        """
        self._require_finite()
        energies = torch.stack(list(self.energies.values())).tolist() if self.energies else []
        modules = {
            n: ModuleInfo(self.places.site_of[n], t.shape, energy, t.fan_in_fan_out, t.is_router)
            for (n, t), energy in zip(self.targets.items(), energies, strict=True)
        }
        return modules, {s: sums.finish() for s, sums in self.sums.items()}

    def finish(self) -> Statistics:
        """Give what was collected, where it was; provenance holds samples and tokens."""
        modules, sites = self.sums_on_device()
        tokens = self.tokens or max((m.padded_count for m in sites.values()), default=0)
        return Statistics(sites, modules, {"samples": self.samples, "tokens": tokens})
