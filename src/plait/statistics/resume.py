"""Collecting in shards of data, so that an interrupted collection goes on from the last finished one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from plait.disk.store import differences, identity
from plait.errors import InputError, UsageError
from plait.statistics.agreement import merge_statistics
from plait.statistics.collect import collect_statistics
from plait.statistics.collector import Batch
from plait.statistics.distributed import everywhere
from plait.statistics.files import read_identity, read_statistics, write_statistics
from plait.statistics.moments import Statistics


def collect_shards(
    model: nn.Module,
    shards: Sequence[Callable[[], Iterable[Batch]]],
    folder: str | Path,
    target_modules: Sequence[str] | str | None = None,
    *,
    key: Mapping[str, Any] | None = None,
    beside: Callable[[int, Statistics], Statistics] | None = None,
    **options: Any,
) -> Statistics:
    """Collect shard by shard into a folder and add them up; shards that are there already are not collected again.

    Under torch.distributed each rank passes its share of every shard, and a folder of its own.

    An interrupted and resumed collection gives the bits of an uninterrupted one: both add the same files in order.

    Args:
        model: The model, as `collect_statistics` takes it.
        shards: One function per shard that gives its batches; called only where the shard is missing.
        folder: Holds one file per finished shard; the caller removes it once the sum is safe.
        target_modules: Modules, as `collect_statistics` takes them.
        key: What the shards were made of (data hash, seed): a folder of another key is refused.
        beside: (number of a shard, its moments) -> the statistics that are kept of it, where more than moments is wanted.
        **options: Passed to `collect_statistics`.

    Raises:
        UsageError: The folder holds shards of another collection; the difference is in the message.
    """
    if not shards:
        raise InputError("no shards to collect")
    folder = Path(folder)
    plain = {k: v for k, v in options.items() if k not in ("device", "provenance", "distributed")}
    targets = target_modules if isinstance(target_modules, str) or target_modules is None else list(target_modules)
    wanted = identity(
        "statistics shard", {**plain, "target_modules": targets, "shards": len(shards), "key": dict(key or {})}
    )
    parts = []
    for number, shard in enumerate(shards):
        path = folder / f"shard-{number:05d}.stats.safetensors"
        recorded = read_identity(path)
        # Where one rank has it and another has not, some would wait for the others forever.
        if not everywhere(recorded is not None, options.get("distributed")):
            part = collect_statistics(model, shard(), target_modules, **options)
            part = beside(number, part) if beside else part
            write_statistics(path, part, identity=wanted, overwrite=True)
        elif differing := differences(recorded or {}, wanted):
            raise UsageError(f"a shard of another collection: {'; '.join(differing[:4])}", where=str(path))
        parts.append(read_statistics(path))
    return merge_statistics(*parts)
