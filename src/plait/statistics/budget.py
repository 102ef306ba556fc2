"""How the sums of a collection fit a number of bytes: exact at once, exact in groups of layers, or sketched."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.border.counts import plural
from plait.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
BYTES_OF_FLOAT32 = 4
# Below this rank a sketch keeps too little to rank directions by (see docs/results/init.md); above, all it can.
SMALLEST_SKETCH_RANK, LARGEST_SKETCH_RANK = 16, 512


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How sums are held.

    Args:
        form: "exact", "layers" (exact, a group of layers at a time) or "sketch".
        allowed: The budget in bytes.
        needed: Bytes that the chosen form takes, an upper bound.
        layers: Layers in a group, for "layers".
        sketch: Rank, for "sketch".
    """

    form: str
    allowed: int
    needed: int
    layers: int | None = None
    sketch: int | None = None

    def record(self) -> dict[str, int | str]:
        """Describe the plan for the provenance."""
        chosen = {
            "exact": "exact",
            "layers": f"exact, {plural(self.layers or 0, 'layer')} at a time",
            "sketch": "sketch",
        }[self.form]
        return {"allowed": self.allowed, "needed": self.needed, "chosen": chosen}


def bytes_of(text: str) -> int:
    """Read a size such as "800MB", "2 GB", "1.5GiB" or a plain number, in bytes.

    >>> bytes_of("1.5GiB")
    1610612736

    Raises:
        UsageError: Anything else, or nothing left of it.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UsageError(f"memory {text!r} is not a size", hint="such as 800MB or 2GB")
    return size


def plan_memory(
    allowed: int,
    layers: Sequence[Mapping[str, int]],
    *,
    rows: int,
    batch_rows: int,
    state_bytes: int,
    groups: bool,
    ranks: int = 1,
) -> MemoryPlan:
    """Choose the most exact form that fits: all at once, then layer groups (exact too, and slower), then a sketch.

    Args:
        allowed: Bytes for sums; the model and its activations come on top.
        layers: Site -> width of each layer, in order.
        rows: Inputs of a site over all ranks, at most: fewer than its width are kept as a factor.
        batch_rows: Inputs of one batch, at most.
        state_bytes: What layer groups keep between them: the hidden states of all batches.
        groups: Whether layer groups save anything: finished ones go elsewhere.
        ranks: Processes whose sums are added: a site's second copy while it is on its way, and their sketches joined.

    Raises:
        UsageError: Not even a sketch of rank 16 fits; the message says what would.
    """
    exact = [_exact_bytes(layer, rows) for layer in layers]
    spare = max((_site_bytes(d, rows) for layer in layers for d in layer.values()), default=0)  # a product, or a QR
    spare *= 2 if ranks > 1 else 1
    if sum(exact) + spare <= allowed:
        return MemoryPlan("exact", allowed, sum(exact) + spare)
    if groups:
        for size in range(len(layers) - 1, 0, -1):
            needed = max(sum(exact[i : i + size]) for i in range(0, len(exact), size)) + spare + state_bytes
            if needed <= allowed:
                return MemoryPlan("layers", allowed, needed, layers=size)
    widths = [d for layer in layers for d in layer.values()]
    least = _sketch_bytes(widths, SMALLEST_SKETCH_RANK, batch_rows, ranks)
    if least > allowed or rows <= SMALLEST_SKETCH_RANK:
        one = max(exact, default=0) + spare + state_bytes
        smallest = min(least, one) if groups else least
        raise UsageError(
            f"{allowed:,} bytes do not hold the sums of {plural(len(widths), 'site')}",
            where="memory",
            hint=f"at least {smallest:,}, or fewer target modules",
        )
    fits = (
        k
        for k in range(LARGEST_SKETCH_RANK, SMALLEST_SKETCH_RANK - 1, -8)
        if _sketch_bytes(widths, k, batch_rows, ranks) <= allowed
    )
    rank = next(fits, SMALLEST_SKETCH_RANK)
    return MemoryPlan("sketch", allowed, _sketch_bytes(widths, rank, batch_rows, ranks), sketch=rank)


def _site_bytes(width: int, rows: int) -> int:
    return BYTES_OF_FLOAT32 * width * min(rows, width)


def _exact_bytes(layer: Mapping[str, int], rows: int) -> int:
    return sum(_site_bytes(d, rows) + 2 * BYTES_OF_FLOAT32 * d for d in layer.values())


def _sketch_bytes(widths: Sequence[int], rank: int, batch_rows: int, ranks: int) -> int:
    """Buffers of 4 k rows and their diagonals; one site at a time also holds a batch, and its decomposition.

    Added over ranks, a site ends as the rows of all their sketches; on the way it is there three times.
    """
    rows = max(4, ranks) * rank
    return sum(BYTES_OF_FLOAT32 * d * (rows + 3) for d in widths) + 3 * BYTES_OF_FLOAT32 * max(widths) * (
        rows + batch_rows
    )
