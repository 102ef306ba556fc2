"""What somebody asks of a merge on the command line, and which of the ways to answer it is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plait.errors import UsageError
from plait.merging.bake import bake
from plait.merging.driver import plan_merge
from plait.merging.folders import merge_folders, read_all, read_statistics_files
from plait.merging.mergekit import read_mergekit_config
from plait.merging.per_task import merge_per_task
from plait.merging.rank_curve import rank_curve


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """Arguments of `merge_folders`, and what else may be wanted of the result.

    Args:
        folders: ``DIR`` or ``NAME=DIR`` each, or one mergekit YAML file, whose settings then hold.
        bake_into: Local folder of the base: write a full model instead of an adapter.
        per_task: Write EMR's unified adapter with a mask per task.
        curve: Write nothing; say what ranks r, 2r, 4r and R would lose.
    """

    folders: Sequence[str]
    out: Path | None = None
    method: str = "task_arithmetic"
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[float] | None = None
    scale: float = 1.0
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


def answer(request: MergeRequest) -> dict[str, Any]:
    """Do what is asked; the record of it.

    Raises:
        UsageError: Two ways at once, or no place for the result.
    """
    if len(request.folders) == 1 and Path(request.folders[0]).suffix in (".yaml", ".yml"):
        request = replace(request, **read_mergekit_config(Path(request.folders[0])))
    if sum((request.bake_into is not None, request.per_task, request.curve)) > 1:
        raise UsageError("--bake, --per-task and --rank-curve exclude each other")
    if request.curve:
        return _curve(request)
    if request.out is None:
        raise UsageError("where to?", hint="--out DIR")
    if request.per_task:
        return _per_task(request, request.out)
    return _bake(request, request.bake_into, request.out) if request.bake_into else _merge(request, request.out)


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
        overwrite=r.overwrite,
    )


def _bake(r: MergeRequest, base: Path, out: Path) -> dict[str, Any]:
    plan = plan_merge(
        read_all(r.folders),
        r.method,
        options=r.options,
        weights=r.weights,
        scale=r.scale,
        statistics=read_statistics_files(r.statistics),
        rank=r.rank,
        calibrate=r.calibrate,
        seed=r.seed,
        device=r.device,
        base=r.base,
    )
    found = bake(plan, base, out, verify=r.verify, overwrite=r.overwrite)
    return {"method": r.method, "tasks": [a.name for a in plan.adapters], **found}


def _per_task(r: MergeRequest, out: Path) -> dict[str, Any]:
    if r.method not in ("emr", "task_arithmetic"):
        raise UsageError(f"--per-task is EMR's, not {r.method}'s", hint="--method emr")
    if r.options or r.calibrate or r.scale != 1.0 or r.statistics:
        raise UsageError("--per-task takes neither --set, --scale, --stats nor --calibrate")
    return merge_per_task(
        r.folders, out, weights=r.weights, rank=r.rank, seed=r.seed, base=r.base, overwrite=r.overwrite
    )


def _curve(r: MergeRequest) -> dict[str, Any]:
    if r.rank is not None:
        raise UsageError("--rank-curve tries ranks by itself", hint="leave --rank out")
    rows = rank_curve(
        list(r.folders),
        r.method,
        options=r.options,
        weights=r.weights,
        scale=r.scale,
        statistics=r.statistics,
        calibrate=r.calibrate,
        seed=r.seed,
        device=r.device,
        base=r.base,
    )
    return {"method": r.method, "curve": rows}
