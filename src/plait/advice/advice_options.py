"""The ways to serve some adapters, and what each takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from plait.adapters.lora import Adapter
from plait.choosing import costs
from plait.fidelity.measure import Fidelity
from plait.fidelity.record import Option

SEPARATELY, SINGLE = "serve separately", "the best single adapter"
_MB = 1e6


def merged_name(rank: int, whole: int) -> str:
    """Name a merge at a rank; `whole` is the adapters' ranks added up."""
    return f"merged, rank {rank}" if rank == whole else f"merged, cut to rank {rank}"


def options_of(
    adapters: Sequence[Adapter], sizes: tuple[int, int] | None, kept: Mapping[str, Fidelity]
) -> list[Option]:
    """List the ways to serve adapters: side by side first, then each merge, and the best of them alone.

    Args:
        adapters: The adapters.
        sizes: Bytes of the base and floating-point operations of a token through it; None where they are not known.
        kept: Name of what was measured -> its fidelity; {} where nothing was.
    """
    r, R = max(a.rank for a in adapters), costs.total_rank(adapters)
    heads = costs.head_bytes(adapters)
    every = sum(map(costs.adapter_bytes, adapters))
    rows = [_option(SEPARATELY, every, max(costs.added_flops([a], a.rank) for a in adapters), sizes)]
    rows[0] = replace(rows[0], kept=1.0, worst=1.0)
    names = [*kept] or list(dict.fromkeys(merged_name(rank, R) for rank in (R, r)))  # where r is R there is no cut
    for name in names:
        single = name.startswith(SINGLE)
        rank = r if single or f"rank {r}" == name.rpartition(", ")[2].removeprefix("cut to ") else R
        size = costs.factors_at(adapters, rank, costs.merged_itemsize(adapters)) + heads
        rows.append(_kept(_option(name, size, costs.added_flops(adapters, rank), sizes), kept.get(name)))
        if name == f"merged, rank {R}":
            rows.append(_kept(_option("merged, baked into the base", heads, 0, sizes), kept.get(name)))
    return rows


def _option(name: str, size: int, flops: int, sizes: tuple[int, int] | None) -> Option:
    beside = f"{size / _MB:{'.1f' if size >= _MB else '.2g'}} MB" if size else ""
    if sizes is None:
        return Option(name, f"base + {beside}" if beside else "base", size, f"+{flops / 1e6:.2f} Mflop")
    # Not their sum: beside a large base adapters of very different sizes would look the same.
    memory = f"{sizes[0] / _MB:.1f}{' + ' if beside else ' '}{beside or 'MB'}"
    return Option(name, memory, size + sizes[0], f"+{100 * flops / max(1, sizes[1]):.1f} %")


def _kept(option: Option, fidelity: Fidelity | None) -> Option:
    if fidelity is None:
        return option
    worst = min(fidelity.tasks, key=lambda t: t.kept_agreement)
    return replace(option, kept=fidelity.kept_agreement, worst=worst.kept_agreement, worst_task=worst.task)
