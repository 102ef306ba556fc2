"""The ways to answer what somebody asks of a merge, by torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from plait.adapters.naming import split_name
from plait.disk.overwriting import require_apart
from plait.disk.written import Written
from plait.errors import UsageError
from plait.formats.reading import format_of
from plait.merging.bake.baking import bake, require_low_rank
from plait.merging.curve import rank_curve
from plait.merging.folders import merge_folders, places, read_all, read_statistics_files, spec_for, write_merge
from plait.merging.mergekit import read_mergekit_config
from plait.merging.outcomes import BakeRecord, RankCurve
from plait.merging.per_task import merge_per_task
from plait.merging.planning import plan_merge, require_use
from plait.merging.record import MergeRecord
from plait.merging.request import MergeRequest
from plait.merging.scales import default_method
from plait.merging.stack import composed, in_order, layers_of
from plait.model.files import base_place


def answer_by_torch(request: MergeRequest) -> Written[MergeRecord] | Written[BakeRecord] | RankCurve:
    """Do what is asked, and give the record of it.

    Raises:
        UsageError: Two ways at once, or no place for the result.
    """
    if len(request.folders) == 1 and Path(request.folders[0]).suffix in (".yaml", ".yml"):
        folders, spec = read_mergekit_config(Path(request.folders[0]), request.spec)
        request = replace(request, folders=folders, spec=spec)
    require_use(request.spec, request.statistics, len(request.folders), cuts=request.curve)
    if sum((request.bake_into is not None, request.per_task, request.curve)) > 1:
        raise UsageError("--bake, --per-task and --rank-curve exclude each other")
    if request.curve:
        return _curve(request)
    if request.out is None:
        raise UsageError("where to?", hint="--out DIR")
    if request.per_task:
        return _per_task(request, request.out)
    if request.stack:
        return _stack(request, request.out)
    if request.bake_into:
        adapters = read_all(request.folders)
        require_low_rank(adapters, request.bake_into)
        statistics = read_statistics_files(request.statistics)
        plan = plan_merge(adapters, spec_for(adapters, request.spec), statistics=statistics)
        base = base_place(request.bake_into)
        return bake(plan, base, request.out, verify=request.verify, overwrite=request.overwrite)
    return merge_folders(
        request.folders,
        request.out,
        request.spec,
        statistics=request.statistics,
        format=request.format,
        dtype=request.dtype,
        verify=request.verify,
        overwrite=request.overwrite,
    )


def _stack(request: MergeRequest, out: Path) -> Written[MergeRecord]:
    spec = request.spec
    summed = spec.method in ("cat", "task_arithmetic", None)
    if not summed or spec.options or spec.is_weighted or spec.scale is not None or request.bake_into:
        raise UsageError(
            "--stack adds the updates as they are: no --method, --set, --weights, --scale or --bake with it"
        )
    if len(request.folders) < 2 or spec.calibrate or request.statistics:
        raise UsageError("--stack takes two adapters or more, and neither --calibrate nor --stats")
    ordered = in_order(read_all(request.folders))
    plan = plan_merge(composed(ordered), replace(spec, method="cat", disjoint=True))
    require_apart(out, places(plan.adapters))
    return write_merge(
        plan,
        out,
        format=request.format or format_of(plan.adapters[0]),
        dtype=request.dtype,
        verify=request.verify,
        overwrite=request.overwrite,
        stack=layers_of(ordered),
    )


def _per_task(request: MergeRequest, out: Path) -> Written[MergeRecord]:
    if request.format is not None or any(split_name(f)[1].endswith(".safetensors") for f in request.folders):
        raise UsageError("--per-task writes PEFT folders", hint="plait convert --to peft, then merge each component")
    if request.statistics:
        raise UsageError("--per-task takes neither --set, --scale, --stats nor --calibrate")
    return merge_per_task(request.folders, out, request.spec, dtype=request.dtype, overwrite=request.overwrite)


def _curve(request: MergeRequest) -> RankCurve:
    if request.spec.rank is not None:
        raise UsageError("--rank-curve tries ranks by itself", hint="leave --rank out")
    statistics, adapters = read_statistics_files(request.statistics), read_all(request.folders)
    method = request.spec.method or default_method(adapters, request.spec, statistics, cuts=True)[0]
    rows = rank_curve(adapters, replace(request.spec, method=method), statistics=statistics)
    return RankCurve(method, tuple(rows))
