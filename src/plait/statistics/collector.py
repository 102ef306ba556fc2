"""Hooks that add what every site reads to its sums, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from plait.errors import InputError, RunError
from plait.statistics.accumulate import SiteSums, means
from plait.statistics.masks import BatchMasks, Positions
from plait.statistics.moments import ModuleInfo, Moments, Statistics
from plait.statistics.passes import Enough, ForwardPasses, examples_in
from plait.statistics.sites import SiteMap, input_of, memory_of
from plait.statistics.targets import Target

Batch = Mapping[str, Tensor]


class Collector:
    """Hooks that add every batch to the sums of the sites.

    Args:
        targets: Modules to collect for.
        found: Their sites.
        passes: How to run a batch.
        pool, sketch: See `collect_statistics`.
        stop_early: End a pass once every module has been called, where each is called once.
        dense: Accumulate dense matrices from the first row (nothing will be written to disk).
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        found: SiteMap,
        passes: ForwardPasses,
        *,
        pool: str,
        sketch: int | None = None,
        stop_early: bool = True,
        dense: bool = False,
    ) -> None:
        self.targets = {n: targets[n] for n in found.site_of}
        self.found, self.passes = found, passes
        self.stops = stop_early and found.once_each
        sizes = {s: targets[s].shape[1] for s in found.sites}
        self.sums = {
            s: SiteSums(d, passes.dtype, passes.device, pool=pool, sketch=sketch, dense=dense) for s, d in sizes.items()
        }
        self.pool = pool
        self.energies = {n: torch.zeros((), dtype=torch.float64, device=passes.device) for n in found.site_of}
        self.samples = self.tokens = self.batch = 0
        self._followers = {s: sum(1 for x in found.site_of.values() if x == s) - 1 for s in found.sites}
        self._live: dict[str, list[Tensor]] = {}
        self._awaited: dict[str, int] = {}
        self._pending: set[str] = set()
        self._checks: list[tuple[str, Tensor]] = []  # of the batch that runs
        self._unread: tuple[int, list[tuple[str, Tensor]]] = 0, []  # of the batch before, so that no GPU is waited for
        self._masks: BatchMasks | None = None

    def consume(self, batches: Iterable[Batch], run: Callable[[Batch], None] | None = None) -> None:
        """Run all batches; `run` replaces the plain forward pass."""
        handles = [h for t in self.targets.values() for h in self._hooked(t)]
        try:
            for batch in batches:
                if examples_in(batch):
                    self._consume_one(batch, run or self.passes.run)
            self._live.clear()
        finally:
            for handle in handles:
                handle.remove()

    def _consume_one(self, batch: Batch, run: Callable[[Batch], None]) -> None:
        self._masks = BatchMasks(batch, getattr(self.passes.base, "config", None), self.passes.device)
        self._pending = set(self.targets)
        self._live.clear()
        self._awaited.clear()
        self._checks = []
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
        leads = self.found.site_of[target.name] == target.name
        see = self._lead if leads else self._follow
        yield target.module.register_forward_pre_hook(
            lambda _m, args, kwargs: see(target, input_of(target, args, kwargs)), with_kwargs=True
        )
        yield target.module.register_forward_hook(lambda _m, _a, output: self._leave(target, output))

    def _fit(self, name: str, shape: torch.Size) -> Positions:
        assert self._masks is not None  # set before every pass
        return self._masks.fit(shape, self.found.role_of[self.found.site_of[name]], name)

    def _lead(self, target: Target, h: Tensor) -> None:
        if followers := self._followers[target.name]:
            self._live.setdefault(target.name, []).append(h)
            self._awaited[target.name] = self._awaited.get(target.name, 0) + followers
        self._checks.append((target.name, self.sums[target.name].add(h, self._fit(target.name, h.shape))))

    def _follow(self, target: Target, h: Tensor) -> None:
        """Check that the tensor is one the site has counted: sites were found on one example.

        What was counted is kept alive until every follower has been called, so that an address means one tensor.
        """
        site = self.found.site_of[target.name]
        if not any(memory_of(seen) == memory_of(h) for seen in self._live.get(site, [])):
            raise RunError(f"no longer reads what {site!r} reads, as it did for the first example", where=target.name)
        self._awaited[site] -= 1
        if not self._awaited[site]:
            self._live[site].clear()

    def _leave(self, target: Target, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        self.energies[target.name] += self._energy(target, y)
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
            n: ModuleInfo(self.found.site_of[n], t.shape, energy, t.fan_in_fan_out)
            for (n, t), energy in zip(self.targets.items(), energies, strict=True)
        }
        return modules, {s: sums.finish() for s, sums in self.sums.items()}

    def finish(self) -> Statistics:
        """What was collected, where it was; provenance holds samples and tokens."""
        modules, sites = self.sums_on_device()
        tokens = self.tokens or max((m.padded_count for m in sites.values()), default=0)
        return Statistics(sites, modules, {"samples": self.samples, "tokens": tokens})
