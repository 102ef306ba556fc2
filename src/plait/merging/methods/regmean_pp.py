"""RegMean++: RegMean block by block, each block's inputs coming through the blocks already merged. Needs the base and inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import UsageError
from plait.merging.align import assembled
from plait.merging.planning import plan_merge
from plait.merging.record import Merged
from plait.merging.workers import one_by_one
from plait.model.applied import update_of
from plait.model.hooks import Change, hooked, modules_named
from plait.model.running import real_rows, stages_of
from plait.statistics.moments import Moments

Batch = Mapping[str, Tensor]


class _Gathered:
    """One task's moments so far, by module."""

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}

    def moments_for(self, module: str) -> Moments | None:
        """Moments of a module whose block has been reached."""
        return self.moments.get(module)


def regmean_pp(
    adapters: Sequence[Adapter],
    model: nn.Module,
    forward: Callable[[str, Batch], Any],
    batches: Mapping[str, Sequence[Batch]],
    *,
    alpha: float = 0.9,
    normalised: bool = True,
    weights: Sequence[float] | None = None,
    base: str | None = None,
    name: str = "merged",
) -> Merged:
    """RegMean with moments gathered block by block, in the order in which the model runs them.

    For each block, task t's batches run through the model with the merged deltas in the blocks below and t's own delta
    in this one; the inputs of its modules give G_t, and `regmean` merges them.

    Args:
        adapters: At least one.
        model: The base; its modules are found by name, and it is left as it was.
        forward: (task, batch) -> anything; must run `model` on the batch.
        batches: Task -> batches; where one has an ``attention_mask``, padding is left out.
        alpha: As `regmean` has it.
        normalised: As `regmean` has it.
        weights: One per adapter; 1 each by default.
        base: Base id of the result where the adapters name one base by different names.
        name: Of the result.

    Returns:
        The merge, exact at rank R.

    Raises:
        UsageError: No batches for a task, or modules the model does not have or never runs.

    Cost:
        One forward pass of every batch per block, and RegMean's solves.
    Source: Nguyen et al., 2025 (arXiv:2508.03121).
    **Deviates**: only the adapters' modules are merged; all else is the base's in every task, as it is in the result.
    """
    gathered: dict[str, Any] = {a.name: _Gathered() for a in adapters}
    plan = plan_merge(
        adapters,
        "regmean",
        options={"alpha": alpha, "normalised": normalised},
        weights=weights,
        scale=1.0,
        statistics=gathered,
        base=base,
    )
    adapters = plan.adapters
    if lacking := [a.name for a in adapters if not batches.get(a.name)]:
        raise UsageError(f"no batches for {', '.join(lacking)}")
    modules = modules_named(model, list(plan.common.modules))
    merged: dict[str, LoraFactors] = {}
    for block in _blocks(modules, lambda: forward(adapters[0].name, batches[adapters[0].name][0])):
        for adapter in adapters:
            own = {m: adapter.modules[m] for m in block if m in adapter.modules}
            changes = {m: update_of(f.folded(), m) for m, f in (merged | own).items()}
            found = _gather(modules, block, changes, lambda b, a=adapter: forward(a.name, b), batches[adapter.name])  # type: ignore[misc]
            gathered[adapter.name].moments |= found
        merged |= dict(zip(block, one_by_one(lambda m: plan.merged(m)[0], block), strict=True))
    ordered = {m: merged[m] for m in plan.common.modules}
    record = replace(plan.record(ordered, dict.fromkeys(ordered, 0.0)), method="regmean_pp")
    return Merged(assembled(name, plan.common, adapters, ordered), record)


def _blocks(modules: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[list[str]]:
    """Modules in the order in which they run, those of one numbered layer together."""
    blocks: dict[str, list[str]] = {}
    for module in (m for stage in stages_of(modules, run) for m in stage.modules):
        numbered = re.match(r".*?\.\d+(?=\.)", f".{module}")
        blocks.setdefault(numbered.group(0) if numbered else module, []).append(module)
    return list(blocks.values())


def _gather(
    modules: Mapping[str, nn.Module],
    block: Sequence[str],
    changes: Mapping[str, Change],
    forward: Callable[[Batch], Any],
    batches: Sequence[Batch],
) -> dict[str, Moments]:
    sums = {m: Moments.zero(0) for m in block}
    mask: Tensor | None = None

    def gather(name: str) -> Change:
        def take(h: Tensor, output: Tensor) -> Tensor:
            rows = real_rows(h, mask).float()
            new = Moments(len(rows), rows.sum(0), rows.T @ rows)
            sums[name] = new if sums[name].dim == 0 else sums[name].merge(new)
            return output

        return take

    watched = [*((m, gather(m)) for m in block), *changes.items()]
    with torch.no_grad(), hooked((modules[m], change) for m, change in watched):
        for batch in batches:
            mask = batch.get("attention_mask")
            forward(batch)
    return sums
