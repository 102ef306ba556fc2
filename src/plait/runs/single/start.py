"""Single stages as they are asked for at the prompt: files in, a folder out, no recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from plait.adapters.peft_format import read_adapter, write_adapter
from plait.disk.overwriting import require_apart
from plait.disk.store import identity, is_done, read_manifest, sha256_file, staged_folder
from plait.model.base import device_named
from plait.statistics.lazy import open_statistics, read_own_and_others
from plait.subspaces import compute_subspaces
from plait.subspaces.post import move_into
from plait.subspaces.start import InitialSettings, initial_adapters, task_type_of
from plait.training.snippets import require_trainer


def initialise_from_files(
    own: Path,
    others: Sequence[Path],
    settings: InitialSettings,
    out: Path,
    *,
    background: Sequence[Path] = (),
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    trainer: str | None = None,
) -> dict[str, Any]:
    """Read statistics files, choose the subspace of the first against the rest, write the PEFT folder.

    `trainer`, where one is named, must be one that trains the adapter's task type.

    Returns:
        output, task, base, task_type, subspace, rank, row_norm, others; `completed` where there are any (see `osrm`);
        `reused` where the folder already held it.

    Raises:
        UsageError: No others for a method that needs them; `out` holds something else.
        InputError: A file that cannot be read, or files of different bases.
    """
    where = device_named(device)
    require_apart(out, [own, *others, *background])
    task, statistics = read_own_and_others(own, others)
    mine = statistics[task]
    settings = replace(settings, task_type=settings.task_type or task_type_of(mine))
    if trainer is not None:
        require_trainer(trainer, settings.task_type)
    pools = [open_statistics(p) for p in background]
    inputs = _hashes(own, others, background)
    wanted = identity("initial", {**asdict(settings), "task": task}, inputs, seed)
    base, revision = str(mine.provenance.get("base", "")), mine.provenance.get("revision")
    summary = {
        "output": str(out.absolute()),
        "task": task,
        "base": base,
        "task_type": settings.task_type,
        "others": [t for t in statistics if t != task],
    }
    if is_done(out, wanted, overwrite=overwrite):
        return {**summary, "reused": True}
    made = initial_adapters(
        statistics, settings, base=base, revision=revision, tasks=[task], seed=seed, background=pools, device=where
    )
    adapter, record = made[task]
    if pools:
        weight = 1.0 if len(statistics) == 1 else settings.background_weight  # nobody else to mix it with
        record |= {"background": [p.name for p in background], "background_weight": weight}
    result: dict[str, Any] = {}
    with staged_folder(out, wanted, overwrite=overwrite, result=result) as folder:
        result |= record
        write_adapter(folder, adapter)
    return {**summary, **record, "reused": False}


def _hashes(own: Path, others: Sequence[Path], background: Sequence[Path]) -> dict[str, str]:
    found = {"own": sha256_file(own), **{f"other {p.name}": sha256_file(p) for p in others}}
    return found | {f"background {p.name}": sha256_file(p) for p in background}


def move_from_files(
    folder: Path,
    own: Path,
    others: Sequence[Path],
    settings: InitialSettings,
    out: Path,
    *,
    background: Sequence[Path] = (),
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Move a trained adapter into a subspace of its task and write the result.

    Args:
        folder: The trained adapter.
        own: Statistics of its task; B is fitted again on them, in closed form.
        others: Statistics of the other tasks.
        settings: Method, rank, options, background's weight; alpha, task type and targets are the adapter's own.
        out: The folder to write.
        background: Statistics of public text that stand for tasks nobody knows yet.
        seed: Of methods that draw at random.
        device: Where the subspace is sought.
        overwrite: Replace what stands there.

    Returns:
        output, task, subspace, rank, `energy_kept` (mean over modules) and `worst_module` with its share.
    """
    where = device_named(device)
    require_apart(out, [folder, own, *others, *background])
    adapter = read_adapter(folder)
    task, statistics = read_own_and_others(own, others)
    options: dict[str, Any] = {"method": settings.method, "rank": settings.rank, "options": dict(settings.options)}
    if background:
        options["background_weight"] = settings.background_weight
    inputs = {"adapter": adapter.source["sha256"], **_hashes(own, others, background)}
    wanted = identity("post", options, inputs, seed)
    if is_done(out, wanted, overwrite=overwrite):
        return {**(read_manifest(out) or {})["result"], "output": str(out.absolute()), "reused": True}
    spaces = compute_subspaces(
        settings.method,
        statistics,
        tasks=[task],
        rank=settings.rank,
        options=settings.options,
        seed=seed,
        background=[open_statistics(p) for p in background] or None,
        background_weight=settings.background_weight,
        device=where,
    )
    moved, kept = move_into(adapter, spaces[task], statistics=statistics[task])
    worst = min(kept, key=lambda m: kept[m])
    result: dict[str, Any] = {"task": adapter.name, "subspace": settings.method, "rank": settings.rank}
    result |= {"energy_kept": sum(kept.values()) / len(kept), "worst_module": [worst, kept[worst]]}
    with staged_folder(out, wanted, overwrite=overwrite, result=result) as stage:
        write_adapter(stage, moved)
    return {**result, "output": str(out.absolute()), "reused": False}
