"""Adapters that point the same way, as stages of one training do: seen in a few modules, while they are merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from plait.adapters.arrays import Floats, array_of, floats
from plait.adapters.lora import LINEAR, Adapter, LoraFactors
from plait.merging.light.sums import probes_of, times_rows
from plait.merging.record import MergeRecord
from plait.merging.terms import Terms

# Task vectors of adapters that were trained apart have a cosine near 0; of stages of one training above 0.9.
KIN = 0.5
# Of two public stages every module has a cosine of 0.97 to 0.98, of two adapters trained apart -0.01 to 0.14: few are enough.
_LOOKED_AT = 4
# What random directions say of a cosine is off by about 0.15 where two updates write the same few outputs. Pairs above the first
# number are looked at exactly, the nearest ones of them alone: one is told.
_WORTH_A_LOOK, _MOST_PAIRS = 0.2, 8

Pair = tuple[str, str, float]


def kin_sentence(one: str, other: str, cosine: float, more: int = 0) -> str:
    """Say that two adapters point the same way, and how many more pairs do."""
    others = f" (so do {more} more pairs)" if more > 1 else " (so does one more pair)" if more else ""
    return (
        f"{one} and {other} point much the same way (cosine {cosine:.2f}){others}: one may have been trained on from the other, and "
        "then the later one does both"
    )


def with_kin(record: MergeRecord, terms: Terms) -> MergeRecord:
    """Add a line to a merge's record where two of its adapters point the same way."""
    return replace(record, beside=(*record.beside, *kin_lines(terms.adapters, terms.weights)))


def kin_lines(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[str]:
    """Say in one line which adapters that are added up point the same way, the nearest pair by name; [] where none do.

    Cost: of four modules, four products of every adapter's factors with a vector, and the inner products of nearly parallel pairs:
    one to three hundredths of what the plainest sum takes.
    """
    signs = [(w > 0) - (w < 0) for w in weights]
    akin = _akin([a for a, s in zip(adapters, signs, strict=True) if s > 0])
    akin += _akin([a for a, s in zip(adapters, signs, strict=True) if s < 0])
    if not akin:
        return []
    nearest = max(akin, key=lambda pair: pair[2])
    return [kin_sentence(*nearest, more=len(akin) - 1)]


def _akin(adapters: Sequence[Adapter]) -> list[Pair]:
    """Pairs whose updates have a cosine above `KIN` in some modules that both have."""
    modules = _some_modules(adapters)
    inner = _inner_by_probes(adapters, modules)
    sizes = np.sqrt(inner.diagonal())
    near = [
        (float(inner[i, j] / (sizes[i] * sizes[j])), i, j)
        for i, j in combinations(range(len(adapters)), 2)
        if inner[i, j] > _WORTH_A_LOOK * sizes[i] * sizes[j] > 0
    ]
    pairs = [(adapters[i], adapters[j]) for _, i, j in sorted(near, reverse=True)[:_MOST_PAIRS]]
    exact = [(a.name, b.name, _cosine(a, b, modules)) for a, b in pairs]
    return [pair for pair in exact if pair[2] > KIN]


def _some_modules(adapters: Sequence[Adapter]) -> list[str]:
    """A few linear layers that two adapters or more change, spread over the model by their names."""
    counts = Counter(m for a in adapters for m, f in a.modules.items() if f.kind == LINEAR and f.rank)
    names = sorted(m for m, n in counts.items() if n > 1)
    return sorted({names[i * len(names) // _LOOKED_AT] for i in range(_LOOKED_AT)}) if names else []


def _inner_by_probes(adapters: Sequence[Adapter], modules: Sequence[str]) -> Floats:
    """About <D_t, D_u> over some modules, (T, T): of random directions X, <D_t X, D_u X>."""
    total = np.zeros((len(adapters), len(adapters)))
    for module in modules:
        places = [i for i, a in enumerate(adapters) if module in a.modules]
        factors = [adapters[i].modules[module] for i in places]
        probes = probes_of(factors[0].shape[1], 0)
        moved = np.stack([_applied(f, probes) for f in factors]).reshape(len(places), -1)
        total[np.ix_(places, places)] += moved @ moved.T
    return total


def _applied(factors: LoraFactors, probes: Floats) -> Floats:
    inner = times_rows(probes, array_of(factors.A)) * np.float32(factors.scaling)
    return times_rows(inner, array_of(factors.B))


def _cosine(one: Adapter, other: Adapter, modules: Sequence[str]) -> float:
    """The cosine of two adapters' updates in those of some modules that both have."""
    both = [(one.modules[m], other.modules[m]) for m in modules if m in one.modules and m in other.modules]
    cross = sum(_inner(f, g) for f, g in both)
    size = sum(_inner(f, f) for f, _ in both) * sum(_inner(g, g) for _, g in both)
    return cross / size**0.5 if size > 0 else 0.0


def _inner(f: LoraFactors, g: LoraFactors) -> float:
    """<D, D'> = tr(B^T B' A' A^T), from two (r, r') matrices."""
    fA, fB, gA, gB = (floats(array_of(x)) for x in (f.A, f.B, g.A, g.B))
    return f.scaling * g.scaling * float(np.sum((fB.T @ gB) * (fA @ gA.T), dtype=np.float64))
