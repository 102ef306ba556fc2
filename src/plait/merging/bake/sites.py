"""Where each delta of a merge goes in a base: the stored weight that takes it, and how it lies there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from plait.adapters.beside import TIED_OUTPUT_NAMES
from plait.adapters.lora import EMBEDDING, EXPERT, Adapter, zero_factors
from plait.errors import InputError
from plait.merging.align import assembled
from plait.merging.bake.expert_parts import expert_parts
from plait.merging.dense import DenseDelta, as_dense
from plait.merging.plan import Plan
from plait.model.conv1d import is_turned
from plait.model.stored import StoredTensor
from plait.model.stored_names import tensor_of

if TYPE_CHECKING:
    from plait.model.layout import StoredParameter
    from plait.model.ties import Ties


@dataclass(frozen=True, slots=True)
class Site:
    """One module's delta and the stored weight it goes into.

    Args:
        module, tensor: Names of both.
        stored: The weight in the base.
        delta: (out, in).
        transposed: Whether the weight is stored (in, out).
        unties: Whether input and output embedding are one tensor in the base and no longer can be.
        is_output: Whether the delta belongs to the untied output layer, which starts as a copy of the embedding.
    """

    module: str
    tensor: str
    stored: StoredTensor
    delta: DenseDelta
    transposed: bool
    unties: bool
    is_output: bool


def deltas_of(source: Adapter | Plan) -> tuple[Adapter, dict[str, DenseDelta]]:
    """Give an adapter, and each module's delta; of a merge its names alone, and dense deltas, its modules side by side."""
    if not isinstance(source, Plan):
        return source, {m: as_dense(f) for m, f in source.modules.items()}
    source.prepare()
    names = list(source.common.modules)
    return shell(source), dict(zip(names, source.each(lambda m: merged_delta(source, m), names), strict=True))


def shell(plan: Plan) -> Adapter:
    """Give the merged adapter's names, heads and kinds, its factors left out."""
    none = {m: zero_factors((0, 0), 1, kind) for m, (_, kind) in plan.common.modules.items()}
    return assembled("merged", plan.common, plan.adapters, none)


def merged_delta(plan: Plan, module: str) -> DenseDelta:
    """Merge one module of a plan, scale applied, cut only where a rank was asked for."""
    plan.prepare()
    if plan.rank is not None or (plan.calibration and plan.calibration.reshaped):
        return as_dense(plan.merged(module)[0])
    x = plan.view(module)
    result = plan.method.function(x, **plan.options)
    dense = result if isinstance(result, DenseDelta) else as_dense(result)
    scale = plan.scale
    if plan.calibration:
        scale *= plan.calibration.after(x, dense.energy() ** 0.5)
    if (f := dense.factors) is not None:  # whose product nobody else holds
        product = lambda start, stop: (f.B[start:stop] @ f.A).mul_(scale).cpu()  # noqa: E731
        return DenseDelta(dense.shape, product, factors=replace(f, scaling=scale))
    return DenseDelta(dense.shape, lambda start, stop: (dense.rows(start, stop) * scale).cpu())


def sites_of(
    adapter: Adapter,
    deltas: Mapping[str, DenseDelta],
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    layout: Mapping[str, StoredParameter],
    ties: Ties,
) -> list[Site]:
    """Find the stored weight that takes each delta; `ties` are the base's where one is of its embedding or output layer."""
    found: list[Site] = []
    tied = ties.is_one
    kind = config.get("model_type")
    for module, dense in deltas.items():
        if module in adapter.modules and adapter.modules[module].kind == EXPERT:
            parts = expert_parts(module, adapter.prefix, dense, layout, tensors)
            found += [Site(module, p.tensor, p.stored, p.delta, p.transposed, False, False) for p in parts]
            continue
        name, is_output = tensor_of(module, adapter, tensors, tied)
        stored = _as_matrix(tensors[name])
        embedding = module in adapter.modules and adapter.modules[module].kind == EMBEDDING
        flipped = (dense.shape[1], dense.shape[0])
        turned = not is_output and is_turned(kind, adapter.fan_in_fan_out, dense.shape, stored.shape)
        transposed = embedding or turned
        if stored.shape != (flipped if transposed else dense.shape):
            raise InputError(f"{module!r} has a delta {dense.shape} and the base a weight {stored.shape}", where=name)
        _ = stored.torch_dtype
        unties = tied and name == ties.embedding
        found.append(Site(module, name, stored, dense, transposed, unties, is_output))
    return found


def moves_ends(adapter: Adapter) -> bool:
    """Whether an adapter changes a base's embedding or output layer."""
    last = (m.rpartition(".")[2] for m in adapter.modules)
    return any(f.kind == EMBEDDING for f in adapter.modules.values()) or any(name in TIED_OUTPUT_NAMES for name in last)


def _as_matrix(stored: StoredTensor) -> StoredTensor:
    """A convolution's weight as (out, in * kernel): the same bytes."""
    return replace(stored, shape=(stored.shape[0], math.prod(stored.shape[1:]))) if len(stored.shape) > 2 else stored
