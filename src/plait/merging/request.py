"""What somebody asks of a merge on the command line, and which of the ways to answer it is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plait.disk.overwriting import require_apart
from plait.errors import UsageError
from plait.merging.bake import bake, require_low_rank
from plait.merging.difference import edit_by_difference
from plait.merging.driver import plan_merge
from plait.merging.edit import Change, base_override, check_statistics, located, named_weights, recorded
from plait.merging.folders import defaults, merge_folders, read_all, read_statistics_files
from plait.merging.mergekit import read_mergekit_config
from plait.merging.module_weights import DEFAULT, ModuleWeights
from plait.merging.outcome import as_given
from plait.merging.per_task import merge_per_task
from plait.merging.plan import Plan
from plait.merging.rank_curve import rank_curve
from plait.merging.registry import find_method
from plait.merging.scales import asks_moments, default_method
from plait.merging.stack import composed, in_order, stack_record
from plait.merging.to_format import is_for_files, merge_to_format
from plait.model.files import base_place


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """Arguments of `merge_folders`, and what else may be wanted of the result.

    Args:
        folders: ``DIR`` or ``NAME=DIR`` each, or one mergekit YAML file, whose settings then hold.
        bake_into: Folder of the base, or its name on the hub: write a full model instead of an adapter.
        per_task: Write EMR's unified adapter with a mask per task.
        curve: Write nothing; say what ranks r, 2r, 4r and R would lose.
        format: "peft", "kohya" or "diffusers": of the result; by default that of the inputs.
        disjoint: They are meant side by side though they have no module in common.
        stack: The adapters were trained one on top of another: compose them in that order.
        module_weights: Adapter -> module pattern -> weight, in place of `weights`.
    """

    folders: Sequence[str]
    out: Path | None = None
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[float] | None = None
    scale: float | None = None
    statistics: Mapping[str, Path | str] | None = None
    rank: int | None = None
    calibrate: str | None = None
    seed: int = 0
    device: str = "cpu"
    verify: bool = True
    base: str | None = None
    overwrite: bool = False
    bake_into: Path | None = None
    per_task: bool = False
    curve: bool = False
    format: str | None = None
    stack: bool = False
    disjoint: bool = False
    module_weights: ModuleWeights | None = None


def answer(request: MergeRequest) -> dict[str, Any]:
    """Do what is asked; the record of it.

    Raises:
        UsageError: Two ways at once, or no place for the result.
    """
    if len(request.folders) == 1 and Path(request.folders[0]).suffix in (".yaml", ".yml"):
        request = replace(request, **read_mergekit_config(Path(request.folders[0])))
    method = request.method or _default(request)
    scaled = request.scale is None and asks_moments(method, request.calibrate)
    if request.statistics and not scaled and not find_method(method).needs:
        why = "takes no statistics" + ("" if request.scale is None else ", and the scale is given")
        raise UsageError(f"{method} {why}", hint="leave --stats out")
    if sum((request.bake_into is not None, request.per_task, request.curve)) > 1:
        raise UsageError("--bake, --per-task and --rank-curve exclude each other")
    if request.curve:
        return _curve(request)
    if request.out is None:
        raise UsageError("where to?", hint="--out DIR")
    if request.per_task:
        if is_for_files(request.folders, request.format):
            raise UsageError(
                "--per-task writes PEFT folders", hint="plait convert --to peft, then merge each component"
            )
        return _per_task(request, request.out)
    if request.stack:
        return _stack(request, request.out)
    if request.bake_into:
        return _bake(request, base_place(request.bake_into), request.out)
    if is_for_files(request.folders, request.format):
        plan = plan_of(request)
        return merge_to_format(
            plan,
            request.out,
            format=request.format,
            verify=request.verify,
            overwrite=request.overwrite,
            statistics=request.statistics,
        )
    return _merge(request, request.out)


def _default(r: MergeRequest) -> str:
    return default_method(len(r.folders), weighted=r.weights is not None or r.module_weights is not None)


def _merge(r: MergeRequest, out: Path) -> dict[str, Any]:
    return merge_folders(
        r.folders,
        out,
        method=r.method,
        options=r.options,
        weights=r.weights,
        scale=r.scale,
        statistics=r.statistics,
        rank=r.rank,
        calibrate=r.calibrate,
        seed=r.seed,
        device=r.device,
        verify=r.verify,
        base=r.base,
        disjoint=r.disjoint,
        overwrite=r.overwrite,
        module_weights=r.module_weights,
    )


def _bake(r: MergeRequest, base: Path, out: Path) -> dict[str, Any]:
    plan = plan_of(r)
    found = bake(plan, base, out, verify=r.verify, overwrite=r.overwrite)
    inputs = as_given(plan.adapters, plan.weights, plan.given)
    how = {"method": plan.method.name, "weights": [w for _, w in inputs], "scale": plan.scale}
    how["scale_reason"] = plan.scale_reason
    return {**how, "tasks": [a.name for a, _ in inputs], **found}


def _stack(r: MergeRequest, out: Path) -> dict[str, Any]:
    if (
        r.method not in ("cat", "task_arithmetic", None)
        or r.options
        or r.weights
        or r.module_weights
        or r.scale is not None
        or r.bake_into
    ):
        raise UsageError(
            "--stack adds the updates as they are: no --method, --set, --weights, --scale or --bake with it"
        )
    if len(r.folders) < 2 or r.calibrate or r.statistics:
        raise UsageError("--stack takes two adapters or more, and neither --calibrate nor --stats")
    ordered = in_order(read_all(r.folders))
    plan = plan_merge(composed(ordered), "cat", rank=r.rank, seed=r.seed, device=r.device, base=r.base, disjoint=True)
    more = stack_record(ordered)
    return merge_to_format(plan, out, format=r.format, verify=r.verify, overwrite=r.overwrite, more=more)


def edit(
    path: Path, change: Change, out: Path, *, by_difference: bool = False, device: str = "cpu", overwrite: bool = False
) -> dict[str, Any]:
    """Merge again what a merge was made of, with adapters added, taken out or weighed anew.

    Args:
        path: A merge that plait wrote, folder or file.
        change: What is to change.
        out: Where the new merge goes.
        by_difference: Add and subtract what changes instead of merging everything: for linear methods, exact, and the
            inputs that stay need not be at hand.
        device: Where to compute.
        overwrite: Replace what stands at `out`.

    Raises:
        InputError: No recorded recipe, or inputs that are gone or have changed (each is named).
        UsageError: Unknown names, nothing left, or a difference of a method that is no weighted sum.
    """
    recipe = recorded(path)
    require_apart(out, [path])
    if recipe.result.get("stack"):
        raise UsageError("a stack is no merge of equals: compose it anew with --stack", where=str(path))
    if by_difference:
        return edit_by_difference(recipe, change, out, overwrite=overwrite)
    weights, added = named_weights(recipe, change)
    check_statistics(recipe, change.statistics)
    places = {**located(recipe, list(weights), change.inputs), **added}
    options = recipe.options
    table = _changed_table(options.get("module_weights"), weights, change)
    request = MergeRequest(
        [f"{name}={places[name]}" for name in weights],
        out,
        str(options["method"]),
        options.get("options", {}),
        list(weights.values()) if table is None else None,
        float(options.get("scale", 1.0)) if change.scale is None else change.scale,
        change.statistics,
        options.get("rank"),
        options.get("calibrate"),
        recipe.seed,
        device,
        base=base_override(recipe),
        overwrite=overwrite,
        format=options.get("format"),
        disjoint=bool(options.get("disjoint")) or not change.add,
        module_weights=table,
    )
    return answer(request)


def _changed_table(table: ModuleWeights | None, weights: Mapping[str, float], change: Change) -> ModuleWeights | None:
    """Weights by module of the adapters that are left; a new weight of an adapter takes the place of all of its own."""
    if table is None:
        return None
    kept = {n: dict(table[n]) if n in table else {DEFAULT: w} for n, w in weights.items()}
    return {**kept, **{n: {DEFAULT: float(w)} for n, w in change.weights.items()}}


def plan_of(r: MergeRequest) -> Plan:
    """The merge that is asked for, everything read and checked."""
    adapters = read_all(r.folders)
    if r.bake_into:
        require_low_rank(adapters, r.bake_into)
    method, scale = defaults(adapters, r.method, r.scale)
    return plan_merge(
        adapters,
        method,
        options=r.options,
        weights=r.weights,
        scale=scale,
        statistics=read_statistics_files(r.statistics),
        rank=r.rank,
        calibrate=r.calibrate,
        seed=r.seed,
        device=r.device,
        base=r.base,
        disjoint=r.disjoint,
        module_weights=r.module_weights,
    )


def _per_task(r: MergeRequest, out: Path) -> dict[str, Any]:
    if r.module_weights is not None:
        raise UsageError("--per-task takes one weight per adapter", hint="--weights 1,0.5")
    if r.method not in ("emr", None):
        raise UsageError(f"--per-task is EMR's, not {r.method}'s", hint="--method emr")
    if r.options or r.calibrate or r.scale is not None or r.statistics:
        raise UsageError("--per-task takes neither --set, --scale, --stats nor --calibrate")
    return merge_per_task(
        r.folders, out, weights=r.weights, rank=r.rank, seed=r.seed, base=r.base, overwrite=r.overwrite
    )


def _curve(r: MergeRequest) -> dict[str, Any]:
    if r.rank is not None:
        raise UsageError("--rank-curve tries ranks by itself", hint="leave --rank out")
    rows = rank_curve(
        list(r.folders),
        r.method or _default(r),
        options=r.options,
        weights=r.weights,
        scale=r.scale,
        statistics=r.statistics,
        calibrate=r.calibrate,
        seed=r.seed,
        device=r.device,
        base=r.base,
    )
    return {"method": r.method or _default(r), "curve": rows}
