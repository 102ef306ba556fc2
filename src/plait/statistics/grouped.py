"""Collecting within a memory budget: all layers at once where they fit, else a group of layers after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from plait.errors import InputError
from plait.statistics.budget import MemoryPlan, plan_memory
from plait.statistics.collector import Collector
from plait.statistics.distributed import everywhere, of_all, reduce_statistics
from plait.statistics.files import write_statistics
from plait.statistics.layers import LayerWalk
from plait.statistics.lazy import joined, open_statistics
from plait.statistics.moments import ModuleInfo, Statistics
from plait.statistics.passes import Batch, ForwardPasses, examples_in, first_example
from plait.statistics.sites import SiteMap, find_sites
from plait.statistics.targets import Target

_PATCHES = 4096


def collect_within(
    allowed: int,
    passes: ForwardPasses,
    targets: Mapping[str, Target],
    batches: Sequence[Batch],
    *,
    pool: str,
    spool: Path | None,
    result_device: torch.device | str,
    added: bool = False,
) -> tuple[Statistics, MemoryPlan]:
    """Statistics whose sums never took more than a number of bytes while they were collected, and how.

    Args:
        allowed: Bytes for the sums, beside the model and its activations.
        passes: Runs batches.
        targets: The target modules.
        batches: All of them: each is run once for every group of layers.
        pool: "token" or "mean".
        spool: A folder that finished groups are written to; the sites of what is returned are read from there when
            asked for. Without it they go to `result_device`, which helps where that is another device.
        result_device: Where sums end up.
        added: Add over the ranks of torch.distributed, group by group.

    Raises:
        UsageError: Nothing fits.
        InputError: As in `collect_statistics`.
    """
    given = [b for b in batches if examples_in(b)]
    if not everywhere(bool(given), added):
        raise InputError(
            "no batches to collect statistics from" if not added else "a rank has no batches",
            hint="fewer processes, or leave memory out" if added else "",
        )
    whole = find_sites(passes.model, targets, lambda: passes.run(first_example(given[0])))
    walk = LayerWalk(passes, targets, 1)
    groups = spool is not None or torch.device(result_device).type != passes.device.type
    plan = _plan(allowed, whole, walk, targets, given, passes, pool, groups, added)
    if plan.form != "layers":
        collector = Collector(targets, whole, passes, pool=pool, sketch=plan.sketch)
        collector.consume(given)
        exact = collector.finish()
        return (reduce_statistics(exact) if added else exact), plan
    walk = LayerWalk(passes, targets, plan.layers or 1)
    parts: list[Statistics] = []
    modules: dict[str, ModuleInfo] = {}
    for number, group in enumerate(_groups(walk, targets, whole, given, pool)):
        part = reduce_statistics(group) if added else group
        modules |= part.modules
        own = {n: i for n, i in part.modules.items() if i.site in part.sites}
        if spool is None:
            sites = {s: m.to(result_device) for s, m in part.sites.items()}
            parts.append(Statistics(sites, own, part.provenance))
        elif own:
            path = spool / f"layers-{number:05d}.stats.safetensors"
            write_statistics(path, replace(part, modules=own), overwrite=True)
            parts.append(open_statistics(path))
    return joined(parts, {n: modules[n] for n in targets if n in modules}), plan


def _plan(
    allowed: int,
    whole: SiteMap,
    walk: LayerWalk,
    targets: Mapping[str, Target],
    given: Sequence[Batch],
    passes: ForwardPasses,
    pool: str,
    groups: bool,
    added: bool,
) -> MemoryPlan:
    layers = []
    placed: set[str] = set()
    for group in walk.groups:
        sites = {whole.site_of[n] for n in group.targets} - placed
        placed |= sites
        layers.append({s: targets[s].shape[1] for s in sorted(sites)})
    sizes = [_positions(b) for b in given]
    hidden = targets[whole.sites[0]].shape[1]  # the first layer reads hidden states
    state = sum(sizes) * hidden * torch.finfo(passes.dtype).bits // 8
    rows = sum(sizes) * max(whole.calls.count(s) for s in whole.sites)
    if pool == "mean":
        rows = sum(examples_in(b) for b in given)
    needs = of_all([rows, max(sizes), state]) if added else [(rows, max(sizes), state)]
    return plan_memory(
        allowed,
        layers,
        rows=sum(n[0] for n in needs),
        batch_rows=max(n[1] for n in needs),
        state_bytes=max(n[2] for n in needs),
        groups=groups,
        ranks=len(needs),
    )


def _positions(batch: Batch) -> int:
    """Positions of a batch; of images, whose patches nobody counts beforehand, more than enough."""
    grids = [v.shape[0] * v.shape[1] for v in batch.values() if isinstance(v, Tensor) and v.ndim == 2]
    return max(grids, default=_PATCHES * examples_in(batch))


def _groups(
    walk: LayerWalk, targets: Mapping[str, Target], whole: SiteMap, given: Sequence[Batch], pool: str
) -> Iterator[Statistics]:
    """One group after the other; sites are called as in a pass through all layers, and a shared one comes once."""
    done: set[str] = set()
    for number, part in enumerate(walk.groups):
        inside = {n: targets[n] for n in part.targets}
        with walk.group(part) as run:
            site_map = find_sites(walk.passes.model, inside, lambda: run(-1, first_example(given[0])))
            last = number == len(walk.groups) - 1
            collector = Collector(inside, site_map, walk.passes, pool=pool, stop_early=last)
            numbers = iter(range(len(given)))
            collector.consume(given, lambda batch, n=numbers: run(next(n), batch))  # type: ignore[misc]
            group_sum = collector.finish()
        names = {s: whole.site_of[s] for s in group_sum.sites}
        sites = {names[s]: m for s, m in group_sum.sites.items() if names[s] not in done}
        done |= set(sites)
        modules = {n: replace(i, site=whole.site_of[n]) for n, i in group_sum.modules.items()}
        if modules:  # of which some may read a site that came before
            yield Statistics(sites, modules, group_sum.provenance)
