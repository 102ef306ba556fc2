"""Collecting statistics: forward passes with a hook on every site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from plait import __version__
from plait.errors import InputError, RunError, UsageError
from plait.statistics.accumulate import POOLS, SiteSums, exact_matmul, means
from plait.statistics.distributed import adds_over_ranks, reduce_statistics
from plait.statistics.masks import BatchMasks, Positions
from plait.statistics.moments import ModuleInfo, Moments, Statistics
from plait.statistics.passes import Enough, ForwardPasses, examples_in, first_example
from plait.statistics.sites import SiteMap, find_sites, input_of, memory_of
from plait.statistics.targets import Target, find_targets

SCHEMA = 1
Batch = Mapping[str, Tensor]


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    target_modules: Sequence[str] | str | None = None,
    *,
    pool: str = "token",
    provenance: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    exclude_modules: Sequence[str] | str | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
    layers_pattern: Sequence[str] | str | None = None,
    sketch: int | None = None,
    stop_early: bool = True,
    distributed: bool | None = None,
    result_device: torch.device | str = "cpu",
) -> Statistics:
    """Second moments of what the target modules read, over the real tokens of the batches.

    Modules that are called with one tensor (q, k and v; gate and up) share one site and one accumulation. The forward
    pass ends at the last wanted module, so no head is computed. LoRA layers of a PeftModel are switched off meanwhile.

    Args:
        model: A transformers model or PeftModel, on its device; FSDP or DDP wrapped, compiled, quantised, offloaded.
        batches: Mappings of tensors; names the model does not take are left out. Pads are masked by `attention_mask`
            (and `decoder_attention_mask`). Under torch.distributed: this rank's share.
        target_modules: As PEFT takes it: suffixes, a regex, "all-linear"; None for the LoRA layers of a PeftModel.
        pool: "token", or "mean" for one masked mean per example.
        provenance: Recorded as it is, beside what is found here.
        device: Where batches go; by default where the model is.
        exclude_modules: As in PEFT's LoraConfig.
        layers_to_transform: As in PEFT's LoraConfig.
        layers_pattern: As in PEFT's LoraConfig.
        sketch: Keep rank-k sketches instead of exact moments (see `FrequentDirections`).
        stop_early: End each forward pass at the last wanted module.
        distributed: Add over all ranks; by default where torch.distributed is initialised.
        result_device: Where the statistics end up; while they are collected and added they stay with the model.

    Returns:
        Statistics, the same on every rank.

    Raises:
        UsageError: Unknown pool, bad target_modules.
        InputError: No batches; a module that is never called; NaN or infinity, with module and batch.
        RunError: A tensor-parallel shard, a mask that fits no input.

    Cost: about 1.1 times the bare forward passes; one (d, d) float32 matrix per site.
    """
    if pool not in POOLS:
        raise UsageError(f"pool {pool!r}, expected one of {', '.join(POOLS)}")
    if sketch is not None and sketch < 1:
        raise UsageError(f"sketch {sketch}, expected at least 1")
    limits = {
        "exclude_modules": exclude_modules,
        "layers_to_transform": layers_to_transform,
        "layers_pattern": layers_pattern,
    }
    targets, prefix = find_targets(model, target_modules, **limits)  # type: ignore[arg-type]
    passes = ForwardPasses(model, device)
    stream, first = _peek(batches)
    with passes.quiet(), exact_matmul():
        collector = None
        if first is not None:
            found = find_sites(model, targets, lambda: passes.run(first_example(first)))
            collector = Collector(targets, found, passes, pool=pool, sketch=sketch, stop_early=stop_early)
            collector.consume(stream)
    collected = collector.finish() if collector else None
    record = {**_found_facts(passes, prefix, pool, target_modules, sketch), **(provenance or {})}
    if adds_over_ranks(distributed):
        collected = reduce_statistics(collected)
    if collected is None:
        raise InputError("no batches to collect statistics from")
    sites = {s: m.to(result_device) for s, m in collected.sites.items()}
    return Statistics(sites, collected.modules, {**record, **collected.provenance})


def _peek(batches: Iterable[Batch]) -> tuple[Iterator[Batch], Batch | None]:
    stream = iter(batches)
    for first in stream:
        if examples_in(first):
            return chain([first], stream), first
    return stream, None


def _found_facts(
    passes: ForwardPasses, prefix: str, pool: str, targets: Sequence[str] | str | None, sketch: int | None
) -> dict[str, Any]:
    config = getattr(passes.base, "config", None)
    named = targets if isinstance(targets, str) or targets is None else sorted(targets)
    return {
        "schema": SCHEMA,
        "plait": __version__,
        "base": getattr(config, "_name_or_path", "") or None,
        "backbone_prefix": prefix,
        "target_modules": named,
        "pool": pool,
        "dtype": str(passes.dtype).removeprefix("torch."),
        "quantisation": _quantisation(passes.base, config),
        "sketch": sketch,
    }


def _quantisation(base: nn.Module, config: Any) -> str | None:
    """What a quantised base is called in the record, such as "bitsandbytes-4bit"; None for plain weights."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        makes = {type(m).__name__ for m in base.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
        return f"bitsandbytes-{'4bit' if 'Linear4bit' in makes else '8bit'}" if makes else None
    plain = found if isinstance(found, dict) else found.to_dict()
    method = getattr(plain.get("quant_method"), "value", plain.get("quant_method"))
    bits = 4 if plain.get("load_in_4bit") else 8 if plain.get("load_in_8bit") else plain.get("bits")
    return f"{method}-{bits}bit" if bits else str(method)


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
