"""Rules that act entry by entry, in the space where entries are compared: dense rows, the lossless core, or KnOTS' S V^T."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.adapters.memory import again_like
from plait.merging.dense import AT_ONCE, DenseDelta, MergedDelta
from plait.merging.entries.compiled import CHUNK, Loops, loops_for
from plait.merging.entries.random_masks import Drops, Place
from plait.merging.entries.tiles import TOGETHER, Products, Spare
from plait.merging.inputs import MergeInputs

# (one part per task, their place for random draws) -> the merged part. A rule may change the parts in place.
Rule = Callable[[Iterable[Tensor], Place], Tensor]


@dataclass(frozen=True, slots=True)
class Election:
    """A rule: drop and trim every task's entries, elect the sign of their weighted sum, average or add those that agree.

    Args:
        weights: One per task.
        agreeing: "mean" or "sum".
        bounds: Per task the magnitude below which entries are zero, or for a stack of modules one for each; none by default.
        drops: What keeps entries at random.
    """

    weights: Sequence[float]
    agreeing: str = "mean"
    bounds: Sequence[float | Tensor] = ()
    drops: Drops | None = None

    def __call__(self, parts: Iterable[Tensor], place: Place) -> Tensor:
        """Take parts in one by one."""
        return self._scaled(signed_mean(self._left(parts, place), self.weights, self.agreeing, place.spare))

    def compiled(self, loops: Loops) -> Callable[[Iterable[tuple[int, Tensor]], Place, Tensor], None]:
        """Give what takes `Products.groups` of a CPU, in float32, and where the result goes: the same bits in one pass."""
        weights = np.array(self.weights, np.float32)
        below = np.array(
            [largest_below(float(b), np.float32) for b in self.bounds] or [-1.0] * len(weights), np.float32
        )
        drops, mean = self.drops, self.agreeing == "mean"
        scale = np.float32(drops.scale if drops else 1.0)

        def take(groups: Iterable[tuple[int, Tensor]], place: Place, out: Tensor) -> None:
            shape, count = (out.shape[0], out.shape[1]), len(weights)
            of_sums = (4, 1, CHUNK) if count <= TOGETHER else (4, *shape)
            sums = place.spare.tensor("sums", of_sums, out.dtype, out.device).numpy()
            whole = place.spare.like(
                "elected", out
            )  # in one piece: a loop whose numbers lie apart takes them one by one
            result = whole.numpy()
            for first, group in groups:
                stop = first + len(group)
                kept = drops.bits(slice(first, stop), place, shape, loops) if drops and drops.acts else None
                rule = below[first:stop], weights[first:stop]
                loops.elect(group.numpy(), kept, *rule, sums, first == 0, stop == count, mean, scale, result)
            out.copy_(whole)

        return take

    def _left(self, parts: Iterable[Tensor], place: Place) -> Iterator[Tensor]:
        for task, part in enumerate(parts):
            part = self.drops.drop(task, part, place) if self.drops else part
            yield keep_from(part, self.bounds[task]) if self.bounds else part

    def _scaled(self, result: Tensor) -> Tensor:
        return result.mul_(self.drops.scale) if self.drops and self.drops.scale != 1.0 else result


def in_space(x: MergeInputs, rule: Rule, space: str = "dense", *, whole_rows: bool = True) -> MergedDelta:
    """Apply a rule to all entries of one module.

    Args:
        x: The module.
        rule: The elementwise rule.
        space: "dense" (the result is dense), "core" (the deltas in the SVD basis of the lossless core) or "knots" (the
            parts S V_t^T of the SVD of all deltas side by side); the last two give exact LoRA factors.
        whole_rows: Whether the rule is given whole rows; one that looks at entries alone is faster without.
    """
    if x.total_rank == 0:
        return x.zero()
    merged = in_blocks(Products.of(*pairs_of(x, space)), rule, space, whole_rows=whole_rows, alike=x.modules)
    if space == "dense":
        return merged
    if space == "core":
        return x.svd_core.factors(merged.dense(), x.kind)
    return LoraFactors(merged.dense(), x.aligned.left, 1.0, x.kind)


def in_blocks(products: Products, rule: Rule, space: str, *, whole_rows: bool = False, alike: int = 1) -> DenseDelta:
    """Apply a rule to products of factors, tile after tile: as many entries as are computed together on the device.

    Args:
        products: Per task, the factors.
        rule: The elementwise rule.
        space: Its name, for random draws.
        whole_rows: Whether the rule is given whole rows.
        alike: How many modules of about this size there are, of which a compiled loop is worth its compilation.
    """
    shape, drawn = products.shape, Place(space, products.shape)
    entries = shape[0] * shape[1] * len(products.lefts) * alike
    elects = isinstance(rule, Election) and products.device.type == "cpu" and products.lefts[0].dtype == torch.float32
    loops = loops_for(entries) if elects else None
    compiled = rule.compiled(loops) if loops and isinstance(rule, Election) else None

    def rows(start: int, stop: int) -> Tensor:
        merged = again_like("rows", products.lefts[0], (stop - start, shape[1]))
        spare = Spare()
        for tile in products.tiles(whole_rows=whole_rows, start=start, stop=stop):
            place = replace(drawn, start=tile.top, left=tile.left, spare=spare)
            here = merged[tile.top - start : tile.bottom - start, tile.left : tile.right]
            if compiled:
                compiled(products.groups(tile, spare), place, here)
            elif isinstance(rule, Election):  # which has done with a group when it asks for the next
                here.copy_(rule((part for _, group in products.groups(tile, spare) for part in group), place))
            else:
                here.copy_(rule(products.parts(tile, spare), place))
        return merged

    return DenseDelta(shape, rows, AT_ONCE)


def pairs_of(x: MergeInputs, space: str = "dense") -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Per task, the two factors whose product is its part in a space: (n, r_t) and (r_t, m)."""
    if space == "dense":
        return x.B, x.A
    if space == "core":
        return x.svd_core.B, x.svd_core.A
    return x.aligned.parts, x.A


def groups_of(x: MergeInputs, spare: Spare, space: str = "dense") -> Iterator[tuple[int, Tensor]]:
    """(first task, blocks of it and of those that follow) of all entries in a space, free to be changed, valid until the next.

    A task without the module has zeros there.
    """
    if not x.total_rank:
        return
    products = Products.of(*pairs_of(x, space))
    for tile in products.tiles(whole_rows=False):
        yield from products.groups(tile, spare)


def keep_from(part: Tensor, bound: float | Tensor) -> Tensor:
    """Zero the entries smaller than `bound` in magnitude, in place; of a stack of parts, each has a bound of its own.

    hardshrink keeps what exceeds a value, so it is given the next one below; it is ten times faster than a mask.
    """
    if isinstance(bound, Tensor):
        for one, b in zip(part, bound.tolist(), strict=True):
            keep_from(one, b)
        return part
    if bound <= 0:
        return part
    return torch.hardshrink(
        part, largest_below(bound, np.float64 if part.dtype == torch.float64 else np.float32), out=part
    )


def largest_below(bound: float, kind: type[np.float32 | np.float64]) -> float:
    """The largest magnitude below a bound; -1, which none has, where the bound is not positive."""
    return float(np.nextafter(kind(bound), kind(0))) if bound > 0 else -1.0


def signed_mean(
    parts: Iterable[Tensor], weights: Sequence[float], agreeing: str = "mean", spare: Spare | None = None
) -> Tensor:
    """Elect the sign of sum_t w_t p_t per entry; the mean, by |w_t|, of the nonzero w_t p_t / |w_t| that agree with it.

    Args:
        parts: One per task, consumed one by one and changed in place.
        weights: One per task; a negative weight turns its task's signs.
        agreeing: "mean", or "sum" of the w_t p_t that agree.
        spare: Where the result and what it takes lie; new memory by default.

    Returns:
        Zero where no entry is left.
    """
    spare = spare or Spare()
    sums: list[Tensor] = []
    for part, weight in zip(parts, weights, strict=True):
        if not sums:
            sums = [spare.like(name, part).zero_() for name in ("total", "mass", "votes", "turnout", "sign")]
        total, mass, votes, turnout, sign = sums
        torch.sign(part, out=sign)
        if weight != 1.0:
            part = part.mul_(weight)
            votes.add_(sign, alpha=weight)
            turnout.addcmul_(sign, sign, value=abs(weight))
            total += part
            mass.add_(part.abs_())
            continue
        # Products with a sign are exact, and one kernel takes a product and a sum: the absolute values need none of their own.
        total += part
        votes += sign
        mass.addcmul_(part, sign)
        turnout.addcmul_(sign, sign)
    total, mass, votes, turnout, sign = sums
    # With s the elected sign, (total + s mass) / 2 is the sum of the entries of that sign: mass and s total have no
    # cancellation to fear, since s total >= 0. No masks: torch's are several times slower than arithmetic.
    elected = torch.copysign(total.new_ones(()), total, out=sign)
    chosen = total.add_(mass.mul_(elected)).mul_(0.5)
    if agreeing == "sum":
        return chosen
    agreed = turnout.add_(votes.mul_(elected)).mul_(0.5)
    return chosen.div_(agreed.clamp_(min=torch.finfo(chosen.dtype).tiny))


def weighted_sum(parts: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_t w_t p_t, one part at a time, changed in place."""
    total: Tensor | None = None
    for part, weight in zip(parts, weights, strict=True):
        if total is None:
            total = part if weight == 1.0 else part.mul_(weight)
        else:
            total.add_(part, alpha=weight)
    if total is None:
        raise ValueError("no parts")
    return total
