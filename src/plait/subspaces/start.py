"""From statistics to adapters that are ready to be trained: files in, a PEFT folder out, no base model needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from plait.adapters.lora import Adapter
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.disk.overwriting import require_apart
from plait.disk.store import identity, is_done, read_manifest, sha256_file, staged_folder
from plait.errors import InputError, UsageError
from plait.model.base import device_named
from plait.options import did_you_mean
from plait.statistics import Statistics, open_statistics
from plait.subspaces import completed, compute_subspaces
from plait.subspaces.initial import initial_adapter
from plait.subspaces.registry import checked_row_norm

_UNRECORDED = "SEQ_CLS"
PEFT_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True, slots=True)
class InitialSettings:
    """How every adapter starts.

    Args:
        method: A subspace method.
        rank: Rows of A.
        alpha: LoRA's alpha; scaling is alpha / rank.
        row_norm: Norm of each row of A; None for the method's own.
        options: Of the method.
        background_weight: Share of the background pool among the others, where there is one, in [0, 1].
        task_type: PEFT's task type; None takes the one that the statistics were collected for (SEQ_CLS in files of old,
            which do not say).
        target_modules: As PEFT's; None lists every module the statistics hold.
    """

    method: str = "contrastive"
    rank: int = 8
    alpha: float = 16.0
    row_norm: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    background_weight: float = 0.5
    task_type: str | None = None
    target_modules: tuple[str, ...] | str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError, before anything is read, for what no adapter can be."""
        if not 0 < self.alpha < math.inf:
            raise UsageError(f"alpha {self.alpha!r}, expected a finite number above 0")
        checked_row_norm(self.row_norm)
        if self.task_type is not None and self.task_type not in PEFT_TASKS:
            raise UsageError(
                f"task type {self.task_type!r} is not one of PEFT's", hint=did_you_mean(self.task_type, PEFT_TASKS)
            )


def initial_adapters(
    statistics: Mapping[str, Statistics],
    settings: InitialSettings,
    *,
    base: str,
    revision: str | None = None,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
    background: Sequence[Statistics] = (),
    device: torch.device | str = "cpu",
) -> dict[str, tuple[Adapter, dict[str, Any]]]:
    """Adapters with B = 0 whose A lies in each task's subspace, and what to remember of how it was chosen.

    That is the task, method, row norm and rank; and `completed` (see `plait.subspaces.completed`), where there is any.

    Args:
        statistics: Task -> its statistics; "the others" of a task are all the other entries.
        settings: Method, rank, alpha, norm.
        base: Name of the base model, written into the adapter.
        revision: Its revision.
        tasks: Which of them get an adapter; all by default.
        seed: Of methods that draw at random.
        background: Statistics of public text that stand for tasks nobody knows yet.
        device: Where to solve.
    """
    found = compute_subspaces(
        settings.method,
        statistics,
        tasks=tasks,
        rank=settings.rank,
        row_norm=settings.row_norm,
        options=settings.options,
        seed=seed,
        background=list(background) or None,
        background_weight=settings.background_weight,
        device=device,
    )
    made = {}
    for task, subspaces in found.items():
        adapter = initial_adapter(
            task,
            base,
            subspaces,
            statistics[task].modules,
            alpha=settings.alpha,
            task_type=settings.task_type or task_type_of(statistics[task]),
            prefix=statistics[task].provenance.get("backbone_prefix", ""),
            target_modules=settings.target_modules,
            source={"completed": lacking} if (lacking := completed(subspaces)) else None,
        )
        first = next(iter(subspaces.values()))
        record = {"task": task, "subspace": first.method, "row_norm": first.row_norm, "rank": settings.rank}
        record |= adapter.source
        made[task] = (replace(adapter, revision=revision), record)
    return made


def task_type_of(statistics: Statistics) -> str:
    """PEFT's task type of the model that statistics were collected on.

    Raises:
        InputError: The file records one that PEFT does not know.
    """
    found = statistics.provenance.get("task_type") or _UNRECORDED
    if found not in PEFT_TASKS:
        raise InputError(f"its task_type is {found!r:.80}, none of PEFT's", hint="--task-type names another")
    return str(found)


def completion_note(task: str, rows: Mapping[str, int]) -> str:
    """A sentence about rows of A that were completed; `rows` is module -> how many."""
    return (
        f"{task}: in {len(rows)} modules the others leave too few tied directions that the task's inputs reach; up to"
        f" {max(rows.values())} rows are the others' next smallest (more samples may help)"
    )


def read_own_and_others(own: str | Path, others: Sequence[str | Path]) -> tuple[str, dict[str, Statistics]]:
    """The own task's name, and statistics by task; a file of the own task among the others is left out.

    Raises:
        UsageError: Two files of one task.
    """
    own = Path(own)
    mine = open_statistics(own)
    task = task_recorded(mine, own)
    statistics = {task: mine}
    for path in map(Path, others):
        if path.exists() and path.samefile(own):  # a glob over the pool may hold it too
            continue
        found = open_statistics(path)
        name = task_recorded(found, path)
        if task in found.provenance.get("tasks", ()):
            raise UsageError(
                f"the pool was merged from files of {task!r} too",
                where=str(path),
                hint="pass the other files one by one",
            )
        if name in statistics:
            raise UsageError(
                f"two statistics files of task {name!r}", where=str(path), hint="a task is not another of itself"
            )
        statistics[name] = found
    return task, statistics


def task_recorded(statistics: Statistics, path: Path) -> str:
    """The task that a statistics file is of: as it says itself, else by its name."""
    return str(statistics.provenance.get("task") or path.name.split(".")[0])


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
        from plait.training.snippets import require_trainer

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
    from plait.subspaces.post import move_into

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
