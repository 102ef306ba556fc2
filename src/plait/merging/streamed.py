"""Merges whose shapes are known before anything is computed: written module by module, never whole in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from plait.adapters.arrays import FLOAT32
from plait.adapters.lora import Adapter, LoraFactors
from plait.merging.align import assembled
from plait.merging.plan import Plan
from plait.merging.rounding import Rounding


def known_shapes(plan: Plan, name: str, dtype: str = FLOAT32) -> Adapter | None:
    """Give the result in a type with shapes in the place of factors: of a weighted sum that is not cut, and of dense rules, which are.

    None where the method has to be run to know, or where the factors are there already.
    """
    if plan.is_unchanged():
        return None
    if plan.method.concatenates:
        shapes = {m: _of_sum(plan, m, dtype) for m in plan.common.modules}
        if plan.rank is not None and plan.rank < max((f.rank for f in shapes.values()), default=0):
            return None
    elif plan.options.get("space") == "dense":
        shapes = {m: _of_cut(plan, m, dtype) for m in plan.common.modules}
    else:
        return None
    return assembled(name, plan.common, plan.adapters, shapes)


def stream_to(plan: Plan, put: Callable[[str, LoraFactors], None], took: Rounding) -> dict[str, tuple[float, float]]:
    """Merge every module and hand it on at once, rounded; none is held.

    Returns:
        Module -> its energy (0 for sums, which lose none), and the fraction lost.
    """
    plan.prepare()

    def one(module: str) -> tuple[float, float]:
        factors, lost = plan.merged(module)
        put(module, took.stored(module, factors))
        return 0.0 if plan.method.concatenates else plan.energy(module, factors), lost

    return dict(zip(plan.common.modules, plan.each(one, list(plan.common.modules)), strict=True))


def _of_sum(plan: Plan, module: str, dtype: str) -> LoraFactors:
    """Inputs of weight 0 leave no rows; a sum of nothing is a zero of rank 1."""
    return _shape(plan, module, max(1, sum(f.rank for _, f in plan.parts(module))), dtype)


def _of_cut(plan: Plan, module: str, dtype: str) -> LoraFactors:
    """What `cut_to_rank` is asked for, as far as the matrix has it."""
    total = sum(f.rank for f in plan.taking_part(module))
    return _shape(plan, module, min(plan.rank or max(1, total), *plan.common.modules[module][0]), dtype)


def _shape(plan: Plan, module: str, rank: int, dtype: str) -> LoraFactors:
    ((out, width), kind), number = plan.common.modules[module], getattr(torch, dtype)
    A = torch.empty(rank, width, dtype=number, device="meta")
    return LoraFactors(A, torch.empty(out, rank, dtype=number, device="meta"), 1.0, kind)
