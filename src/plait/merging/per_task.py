"""EMR on disk: one unified adapter, and per task a bit-packed mask and a rescaler that turn it back into that task's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn

from plait.adapters.arrays import KEEP
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.naming import checked_name
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.adapters.tensor_file import write_tensors
from plait.adapters.tensors import read_tensors
from plait.border.records import to_json
from plait.disk import store
from plait.disk.overwriting import require_apart
from plait.disk.written import Written, standing
from plait.errors import InputError, UsageError
from plait.merging.dense import DenseDelta, row_blocks
from plait.merging.folders import identity_of, places, read_named, rounding_of
from plait.merging.plan import Plan
from plait.merging.planning import plan_merge
from plait.merging.record import MergeRecord
from plait.merging.spec import MergeSettings, MergeSpec
from plait.model.hooks import modules_named

MASKS = "masks"


@dataclass(frozen=True, slots=True)
class TaskDelta:
    """One task's delta of one module: rescaler * mask * unified, made in row blocks.

    Args:
        unified: Factors of the unified delta.
        mask: (out, ceil(in / 8)) uint8, most significant bit first.
        rescaler: l_t.
    """

    unified: LoraFactors
    mask: Tensor
    rescaler: float

    def dense(self) -> DenseDelta:
        """As a dense delta, float32."""
        f = self.unified.folded()
        out, width = f.shape

        def rows(start: int, stop: int) -> Tensor:
            bits = np.unpackbits(self.mask[start:stop].numpy(), axis=1, count=width)
            return (f.B[start:stop] @ f.A).mul_(torch.from_numpy(bits)).mul_(self.rescaler)

        return DenseDelta((out, width), rows)


def merge_per_task(
    folders: Sequence[Path | str],
    out: Path,
    spec: MergeSpec | None = None,
    *,
    dtype: str = KEEP,
    overwrite: bool = False,
    **settings: Unpack[MergeSettings],
) -> Written[MergeRecord]:
    """Merge folders by EMR into a folder that serves every task: the unified adapter, ``masks/<task>.safetensors``.

    Masks and rescalers are taken against the unified delta as it is stored, after its cut to rank; so l_t M_t * unified
    keeps the task's sum of magnitudes exactly. Sums run over all of the model's entries; the
    authors' code adds up the mean of each tensor, which weighs small tensors more and is equal where all have one shape.

    Args:
        folders: ``DIR`` or ``NAME=DIR`` each.
        out: The folder to write.
        spec: Weights, rank, seed and base; method and scale are EMR's.
        dtype: Type of the unified factors; see `plait.merging.folders.merge_folders`.
        overwrite: Whether what stands at `out` is replaced.
        settings: What differs from `spec`.

    Returns:
        The record of the merge with `rescalers`, and per task `relative_error`, |l_t M_t * unified - D_t| / |D_t|.

    Raises:
        UsageError: A method or settings that are not EMR's.
    """
    spec = MergeSpec.of(spec, settings)
    if spec.module_weights is not None:
        raise UsageError("--per-task takes one weight per adapter", hint="--weights 1,0.5")
    if spec.method not in ("emr", None):
        raise UsageError(f"--per-task is EMR's, not {spec.method}'s", hint="--method emr")
    if spec.options or spec.calibrate or spec.scale is not None:
        raise UsageError("--per-task takes neither --set, --scale, --stats nor --calibrate")
    adapters = [read_named(f) for f in folders]
    require_apart(out, places(adapters))
    plan = plan_merge(adapters, replace(spec, method="emr", scale=1.0, device="cpu"))
    took = rounding_of(plan, dtype)
    wanted = identity_of(plan) | {"stage": "merge-per-task"}
    wanted["options"] |= took.identity
    if (before := standing(out, wanted, MergeRecord, overwrite=overwrite)) is not None:
        return before
    merged = plan.run(out.name, took)
    masks, rescalers, errors = _masks(plan, merged.adapter)
    record = replace(merged.record, per_task=True, rescalers=rescalers, relative_error=errors)
    with store.staged_folder(out, wanted, overwrite=overwrite, result=to_json(record)) as stage:
        write_adapter(stage, merged.adapter)
        (stage / MASKS).mkdir()
        for task, packed in masks.items():
            write_tensors(stage / MASKS / f"{checked_name(task, 'task')}.safetensors", packed)
    return Written(record, str(out))


def _masks(plan: Plan, unified: Adapter) -> tuple[dict[str, dict[str, Tensor]], dict[str, float], dict[str, float]]:
    tasks = [a.name for a in plan.adapters]
    masks: dict[str, dict[str, Tensor]] = {t: {} for t in tasks}
    own, masked, inner, squares = (dict.fromkeys(tasks, 0.0) for _ in range(4))
    kept_squares = dict.fromkeys(tasks, 0.0)
    for module, stored in unified.modules.items():
        factors, x = stored.folded(), plan.view(module)
        for t, task in enumerate(tasks):
            packed = []
            for start, stop in row_blocks(x.shape):
                part, whole = x.block(t, start, stop) * x.weights[t], factors.B[start:stop] @ factors.A
                agree = part * whole > 0
                kept = whole * agree
                packed.append(torch.from_numpy(np.packbits(agree.numpy(), axis=1)))
                own[task] += float(part.abs().double().sum())
                masked[task] += float(kept.abs().double().sum())
                inner[task] += float((part.double() * kept.double()).sum())
                squares[task] += float(part.double().square().sum())
                kept_squares[task] += float(kept.double().square().sum())
            masks[task][module] = torch.cat(packed)
    rescalers = {t: own[t] / masked[t] if masked[t] > 0 else 0.0 for t in tasks}
    errors = {
        t: max(0.0, squares[t] - 2 * rescalers[t] * inner[t] + rescalers[t] ** 2 * kept_squares[t]) ** 0.5
        / squares[t] ** 0.5
        if squares[t] > 0
        else 0.0
        for t in tasks
    }
    return masks, rescalers, errors


def load_task(folder: Path, task: str) -> dict[str, TaskDelta]:
    """One task's deltas from a per-task folder, by module relative to the backbone.

    Raises:
        InputError: Not such a folder, or a damaged one.
        UsageError: It holds no such task; those it holds are named.
    """
    result = (store.read_manifest(folder) or {}).get("result", {})
    if not result.get("per_task"):
        raise InputError(
            "not a per-task merge", where=str(folder), hint="plait merge --method emr --per-task writes one"
        )
    if task not in result["rescalers"]:
        raise UsageError(
            f"no task {task!r}", where=str(folder), hint=f"one of: {', '.join(sorted(result['rescalers']))}"
        )
    unified = read_adapter(folder, name="unified")
    masks, _, _ = read_tensors(folder / MASKS / f"{task}.safetensors")
    deltas = {}
    for module, factors in unified.modules.items():
        out, width = factors.shape
        if module not in masks or masks[module].shape != (out, -(-width // 8)):
            raise InputError("the mask does not fit the module", where=f"{folder}/{MASKS}/{task}.safetensors: {module}")
        deltas[module] = TaskDelta(factors, masks[module], float(result["rescalers"][task]))
    return deltas


class TaskSwitch:
    """Holds a model at one task of a per-task merge; switching takes the old delta off and puts the new one on.

    Args:
        model: The base model; modules are found by their names' endings. Its weights are changed in place.
        folder: Written by `merge_per_task`.

    A float32 model comes back within rounding, not to the bit, after a switch.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.active: str | None = None

    def apply(self, task: str | None) -> None:
        """Make `task` the active one; None leaves the base."""
        wanted = load_task(self.folder, task) if task is not None else {}
        current = load_task(self.folder, self.active) if self.active is not None else {}
        for sign, deltas in ((-1.0, current), (1.0, wanted)):
            for weight, delta in self._weights(deltas):
                for start, stop, block in delta.blocks():
                    weight[start:stop] += (block * sign).to(weight.device, weight.dtype)
        self.active = task

    def _weights(self, deltas: dict[str, TaskDelta]) -> Iterator[tuple[Tensor, DenseDelta]]:
        """(weight as (out, in), delta) of every module; a Conv1D's weight is turned."""
        modules = modules_named(self.model, list(deltas))
        for name, delta in deltas.items():
            weight = modules[name].weight
            if not isinstance(weight, Tensor):
                raise UsageError("it has no weight to add to", where=name)
            turned = weight.data.T if type(modules[name]).__name__ == "Conv1D" else weight.data
            if turned.shape != delta.unified.shape:
                raise UsageError(f"its weight is {tuple(turned.shape)}, the delta {delta.unified.shape}", where=name)
            yield turned, delta.dense()
