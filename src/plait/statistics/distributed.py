"""Adding statistics over the ranks of torch.distributed: every rank ends with the moments of all data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from plait.errors import InputError, UsageError
from plait.statistics.moments import DENSE, FACTOR, ModuleInfo, Moments, Statistics, rotated

T = TypeVar("T")


def adds_over_ranks(distributed: bool | None) -> bool:
    """Whether to add over ranks: as asked, or wherever torch.distributed runs with more than one."""
    running = dist.is_available() and dist.is_initialized()
    if distributed and not running:
        raise UsageError("distributed=True and torch.distributed is not initialised", hint="start with torchrun")
    return running and dist.get_world_size() > 1 if distributed is None else distributed


def own_share(items: Iterable[T]) -> Iterator[T]:
    """This rank's share of something all ranks can iterate alike: items rank, rank + world, ...; all of it when alone."""
    if not adds_over_ranks(None):
        return iter(items)
    return islice(items, dist.get_rank(), None, dist.get_world_size())


def everywhere(fact: bool, distributed: bool | None = None) -> bool:
    """Whether something holds on every rank; the fact itself where nothing is added over ranks."""
    return all(_gathered(fact)) if adds_over_ranks(distributed) else fact


def of_all(numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """Some numbers of each rank, in rank order; only this one's where torch.distributed does not run."""
    return _gathered(tuple(numbers)) if dist.is_available() and dist.is_initialized() else [tuple(numbers)]


def reduce_statistics(own: Statistics | None) -> Statistics:
    """Add the statistics of all ranks; None is a rank without data.

    Args:
        own: This rank's, with "samples" and "tokens" in its provenance.

    Returns:
        The sum, equal on every rank and independent of how data was divided, up to rounding.

    Raises:
        InputError: No rank has data, or the ranks found different modules.

    Cost: one all-reduce of (d, d) per site; a gather of factors where all data together has fewer than d inputs.
    """
    shapes = [s for s in _gathered(None if own is None else _Shape.of(own)) if s is not None]
    if not shapes:
        raise InputError("no batches on any rank")
    if any(list(s.modules.items()) != list(shapes[0].modules.items()) for s in shapes):
        raise InputError(
            "the ranks found different modules", hint="start all ranks with the same model and target_modules"
        )
    first = shapes[0]
    sites = {}
    for site, dim in first.widths.items():
        mine = own.sites[site] if own else Moments.zero(dim, first.dtype)
        sites[site] = _reduced(mine, [s.forms[site] for s in shapes], [s.counts[site] for s in shapes])
    numbers = torch.tensor([_numbers(own, first)], dtype=torch.float64)
    _all_reduce(numbers)
    samples, tokens, *energies = numbers[0].tolist()
    modules = {
        name: replace(info, output_energy=energy)
        for (name, info), energy in zip(first.modules.items(), energies, strict=True)
    }
    return Statistics(sites, modules, {"samples": int(samples), "tokens": int(tokens)})


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a rank's statistics look like: what the others must know before sums are added.

    Args:
        modules: Name -> module, its output energy left out.
        widths: Site -> width.
        forms: Site -> form, and whether a sketch left a residual.
        counts: Site -> inputs.
        dtype: Dtype of the sums.
    """

    modules: Mapping[str, ModuleInfo]
    widths: Mapping[str, int]
    forms: Mapping[str, tuple[str, bool]]
    counts: Mapping[str, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, own: Statistics) -> _Shape:
        first = next(iter(own.sites.values()), None)  # a group of layers may read only sites of the one before
        return cls(
            modules={n: replace(i, output_energy=0.0) for n, i in own.modules.items()},
            widths={s: m.dim for s, m in own.sites.items()},
            forms={s: (m.form, m.residual is not None) for s, m in own.sites.items()},
            counts={s: m.count for s, m in own.sites.items()},
            dtype=first.total.dtype if first else torch.float32,
        )


def _numbers(own: Statistics | None, shape: _Shape) -> list[float]:
    if own is None:
        return [0.0] * (2 + len(shape.modules))
    record = own.provenance
    return [record["samples"], record["tokens"], *(i.output_energy for i in own.modules.values())]


def _reduced(mine: Moments, forms: list[tuple[str, bool]], counts: list[int]) -> Moments:
    sketched = any(residual for _, residual in forms)
    small = all(form == FACTOR for form, _ in forms) and (sketched or sum(counts) < mine.dim)
    has_pads = torch.tensor([0.0 if mine.padded_total is None else 1.0], dtype=torch.float32)
    _all_reduce(has_pads, dist.ReduceOp.MIN)
    padded = torch.zeros_like(mine.total) if mine.padded_total is None else mine.padded_total.clone()
    total = mine.total.clone()
    scalars = torch.tensor([mine.count, mine.padded_count, mine.error], dtype=torch.float64)
    for tensor in (total, padded, scalars):
        _all_reduce(tensor)
    second, residual = mine.second, None
    if small:
        second = rotated(torch.cat(_gathered_rows(mine.second)))
        if sketched:
            residual = torch.zeros_like(total) if mine.residual is None else mine.residual.clone()
            _all_reduce(residual)
    else:
        second = mine.dense().clone()
        _all_reduce(second)
    count, padded_count, error = scalars.tolist()
    return replace(
        mine,
        count=int(count),
        total=total,
        second=second,
        form=FACTOR if small else DENSE,
        residual=residual,
        error=error,
        padded_count=int(padded_count),
        padded_total=padded if bool(has_pads) else None,
    )


def _all_reduce(tensor: Tensor, op: Any = None) -> None:
    """In place, through the GPU where the backend is NCCL."""
    there = tensor.to(_device())
    dist.all_reduce(there, op=op or dist.ReduceOp.SUM)
    if there is not tensor:
        tensor.copy_(there)


def _gathered_rows(rows: Tensor) -> list[Tensor]:
    """The factors of all ranks, in rank order."""
    sizes = _gathered(rows.shape[0])
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded, device=_device()) for _ in sizes]
    dist.all_gather(parts, padded.to(_device()))
    return [f[:n].to(rows.device) for f, n in zip(parts, sizes, strict=True)]


def _gathered(value: T) -> list[T]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
