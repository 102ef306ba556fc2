"""What a comparison of adapters holds, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterLength:
    """One adapter, by the size of its update.

    Args:
        name: Its name.
        norm: Frobenius norm of its task vector.
        share: Its square over the sum of all squares, in [0, 1].
        modules: How many modules it adapts.
        rank: The largest rank among them.
    """

    name: str
    norm: float
    share: float
    modules: int
    rank: int


@dataclass(frozen=True, slots=True)
class Pair:
    """Two adapters, over the whole model or one layer of it; None where one of them has no update there.

    Args:
        a, b: Their names.
        cosine: Of their task vectors, in [-1, 1].
        overlap_in: Mean over modules of how much of the smaller row space (what A reads) lies in the larger, in [0, 1].
        overlap_out: The same of the column spaces (what B writes).
        chance_in: What `overlap_in` is on average for random rows.
        opposite: Share of the entries, of those where neither is zero, in which their signs differ; about 0.5 for unrelated ones.
        cancelled: Share of the sum of |a| + |b| over entries that is lost in a + b; about 0.29 for unrelated ones of one length.
        modules: How many modules both have an update in.
    """

    a: str
    b: str
    cosine: float | None = None
    overlap_in: float | None = None
    overlap_out: float | None = None
    chance_in: float | None = None
    opposite: float | None = None
    cancelled: float | None = None
    modules: int = 0


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer.

    Args:
        layer: Its name, such as "encoder.layer.3".
        norms: Adapter -> Frobenius norm of its update there.
        pairs: All pairs of adapters.
    """

    layer: str
    norms: Mapping[str, float]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Adapters beside each other.

    Args:
        base: Their base.
        adapters: Each of them, in the order given.
        pairs: All pairs, over the whole model.
        layers: Layer by layer.
        shifts: Adapter -> task -> how far it is predicted to move a module's outputs on the task's inputs, relative to the base's
            own output energy, mean over modules; empty without statistics.
        modules: How many modules are adapted by any of them.
        verdict: What follows, sentence by sentence.
        record: How far numbers like these told anything, where that was measured.
        next: The command that measures what they cannot tell.
    """

    base: str
    adapters: tuple[AdapterLength, ...]
    pairs: tuple[Pair, ...]
    layers: tuple[Layer, ...]
    shifts: Mapping[str, Mapping[str, float]]
    modules: int
    verdict: tuple[str, ...] = ()
    record: tuple[str, ...] = ()
    next: str = ""
