"""A PeftModel's LoRA layers started in their subspaces, for training elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import InputError, UsageError
from plait.statistics.moments import Statistics
from plait.statistics.targets import find_targets
from plait.subspaces.compute import compute_subspaces


def subspace_state_dict(
    method: str,
    own: Statistics,
    others: Sequence[Statistics] | Mapping[str, Statistics] = (),
    *,
    rank: int = 8,
    row_norm: float | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    background: Statistics | Sequence[Statistics] | None = None,
    background_weight: float = 0.5,
    device: torch.device | str = "cpu",
    weights: Callable[[str], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Module -> A for one task, from its own statistics and the published ones of the others.

    Args:
        method: A registered subspace method.
        own: This task's statistics.
        others: The other tasks', in any order, or by task.
        rank: Rank of the LoRA layers.
        row_norm: See `compute_subspaces`; so are the rest.
        options: Options of the method.
        seed: For what is drawn, by the tasks' names: those of `others`, else those that the statistics record. Tasks whose
            statistics record none draw alike with one seed.
        background: Statistics of public text.
        background_weight: Its share among the others.
        device: Where to compute.
        weights: Module, relative to the backbone -> its weight in the base, (out, in), for a method that needs it.

    Returns:
        Names relative to the backbone -> (r, d) float32, for `initialize_lora_weights`.

    Raises:
        UsageError: Statistics of the own task, or a sum that they are in, among the others or in the background.
    """
    mine, pool = _by_name(own, others)
    spaces = compute_subspaces(
        method,
        {mine: own, **pool},
        tasks=[mine],
        rank=rank,
        row_norm=row_norm,
        options=options,
        seed=seed,
        background=background,
        background_weight=background_weight,
        device=device,
        weights=weights,
    )
    return {module: subspace.A for module, subspace in spaces[mine].items()}


def _by_name(
    own: Statistics, others: Sequence[Statistics] | Mapping[str, Statistics]
) -> tuple[str, dict[str, Statistics]]:
    """The own task's name and the others' by theirs: each task is called the same by all that start from one pool.

    Raises:
        UsageError: The own task is among the others.
    """
    mine = str(own.provenance.get("task") or "own")
    given = list(others.values() if isinstance(others, Mapping) else others)
    names = list(others) if isinstance(others, Mapping) else [s.provenance.get("task") for s in given]
    if mine in names:
        raise UsageError(
            f"statistics of {mine!r} among the others", hint="a task is not another of itself: leave them out"
        )
    pool: dict[str, Statistics] = {}
    for i, (name, other) in enumerate(zip(names, given, strict=True)):
        pool[name if isinstance(name, str) and name not in pool else f"other{i:04d}"] = other
    return mine, pool


def initialize_lora_weights(
    peft_model: nn.Module, state_dict: Mapping[str, Tensor], *, adapter_name: str | None = None
) -> None:
    """Start the LoRA layers of a PeftModel in the given subspaces: A as given, B = 0.

    Args:
        peft_model: From `peft.get_peft_model`, before training.
        state_dict: From `subspace_state_dict`.
        adapter_name: The active one by default.

    Raises:
        UsageError: No LoRA layers, or an unknown adapter.
        InputError: A layer without a subspace, a subspace without a layer, or another rank; nothing is changed then.
    """
    targets, prefix = find_targets(peft_model, None)
    layers = _lora_layers(peft_model)
    name = adapter_name or _active(peft_model)
    wanted = {m.removeprefix(f"{prefix}.") if prefix else m: A for m, A in state_dict.items()}
    for module in sorted({*targets, *wanted}):
        if module not in targets or module not in wanted:
            raise InputError(
                f"has {'a subspace and no LoRA layer' if module in wanted else 'no subspace'}", where=module
            )
        if name not in layers[id(targets[module].module)].lora_A:
            raise UsageError(f"no adapter {name!r} here", where=module)
        shape = tuple(layers[id(targets[module].module)].lora_A[name].weight.shape)
        if shape != tuple(wanted[module].shape):
            raise InputError(
                f"A is {shape}, the subspace {tuple(wanted[module].shape)}", where=module, hint="use one rank"
            )
    with torch.no_grad():
        for module, target in targets.items():
            layer = layers[id(target.module)]
            layer.lora_A[name].weight.copy_(wanted[module])
            layer.lora_B[name].weight.zero_()


def _lora_layers(model: nn.Module) -> dict[int, Any]:
    """The base layer's id -> its LoRA layer."""
    return {id(m.base_layer): m for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A")}


def _active(model: nn.Module) -> str:
    active = getattr(model, "active_adapter", "default")
    return active if isinstance(active, str) else str(active[0])
