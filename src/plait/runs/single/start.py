"""Single stages as they are asked for at the prompt: files in, a folder out, no recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from plait.adapters.peft_format import read_adapter, write_adapter
from plait.border.records import from_json, optional, to_json
from plait.disk.overwriting import require_apart
from plait.disk.store import identity, is_done, read_manifest, sha256_file, staged_folder
from plait.model.base import BaseModel, device_named
from plait.progress import Progress
from plait.runs.base_weights import base_weights
from plait.statistics.lazy import open_background, read_own_and_others
from plait.statistics.moments import Statistics
from plait.subspaces import compute_subspaces
from plait.subspaces.post import move_into
from plait.subspaces.start import InitialSettings, initial_adapters, task_type_of
from plait.training.snippets import require_trainer


@dataclass(frozen=True, slots=True)
class Started:
    """An adapter that is ready to be trained.

    Args:
        output: Its folder, absolute.
        task: Its task.
        base: The base its statistics are of.
        task_type: PEFT's task type.
        others: The other tasks.
        reused: Whether the folder held it already.
        subspace, rank, row_norm: How A was chosen; None where it was reused.
        completed: Module -> rows that its subspace method had to complete (see `osrm`).
        background, background_weight: Files of public text and their share, where there are any.
        snippet: What another trainer needs, where one was named.
    """

    output: str
    task: str
    base: str
    task_type: str | None
    others: tuple[str, ...]
    reused: bool
    subspace: str | None = optional()
    row_norm: float | None = optional()
    rank: int | None = optional()
    completed: Mapping[str, int] | None = optional()
    background: tuple[str, ...] | None = optional()
    background_weight: float | None = optional()
    snippet: str | None = optional()


@dataclass(frozen=True, slots=True)
class Moved:
    """A trained adapter in its task's subspace.

    Args:
        task: The adapter's name.
        subspace, rank: Of the result.
        energy_kept: Share of the update's energy that is kept, mean over modules.
        worst_module: The module that keeps least, and its share.
        output: The folder, absolute.
        reused: Whether the folder held it already.
    """

    task: str
    subspace: str
    rank: int
    energy_kept: float
    worst_module: tuple[str, float]
    output: str = ""
    reused: bool = False


@dataclass(frozen=True, slots=True)
class StatisticsFiles:
    """The files that a task's subspace is chosen from.

    Args:
        own: Statistics of the task.
        others: Those of the other tasks; the own file among them is left out.
        background: Those of public text that stands for tasks nobody knows yet.
    """

    own: Path
    others: Sequence[Path] = ()
    background: Sequence[Path] = ()

    def paths(self) -> list[Path]:
        """Every file, the own one first."""
        return [self.own, *self.others, *self.background]

    def opened(self) -> tuple[str, dict[str, Statistics], list[Statistics]]:
        """The task, the statistics of every task, and the background."""
        task, statistics = read_own_and_others(self.own, self.others)
        return task, statistics, open_background(task, self.background)

    def hashes(self) -> dict[str, str]:
        """What each file is called in the identity of a result, and its hash."""
        own = {"own": sha256_file(self.own)}
        return own | _of_kind("other", self.others) | _of_kind("background", self.background)


def initialise_from_files(
    files: StatisticsFiles,
    settings: InitialSettings,
    out: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    trainer: str | None = None,
    quiet: bool = True,
) -> Started:
    """Read statistics files, choose the task's subspace against the others, write the PEFT folder.

    `trainer`, where one is named, must be one that trains the adapter's task type; `quiet` says nothing of progress on stderr.

    Raises:
        UsageError: No others for a method that needs them; `out` holds something else.
        InputError: A file that cannot be read, or files of different bases.
    """
    where = device_named(device)
    require_apart(out, files.paths())
    task, statistics, pools = files.opened()
    mine = statistics[task]
    settings = replace(settings, task_type=settings.task_type or task_type_of(mine))
    if trainer is not None:
        require_trainer(trainer, settings.task_type)
    wanted = identity("initial", {**asdict(settings), "task": task}, files.hashes(), seed)
    base, revision = str(mine.provenance.get("base", "")), mine.provenance.get("revision")
    others_named = tuple(t for t in statistics if t != task)
    started = Started(str(out.absolute()), task, base, settings.task_type, others_named, reused=True)
    if is_done(out, wanted, overwrite=overwrite):
        return started
    progress = Progress(1.0, 1, quiet)
    progress.start(f"{settings.method} of {task}", 1.0)
    made = initial_adapters(
        statistics, settings, base=base, revision=revision, tasks=[task], seed=seed, background=pools, device=where,
        weights=base_weights(_base_of(mine), mine),
        on_site=lambda done, sites: progress.within(done / sites, f"site {done} of {sites}"),
    )  # fmt: skip
    progress.close(f"{settings.method} of {task}: solved")
    adapter, record = made[task]
    if pools:
        weight = 1.0 if len(statistics) == 1 else settings.background_weight  # nobody else to mix it with
        record |= {"background": tuple(p.name for p in files.background), "background_weight": weight}
    with staged_folder(out, wanted, overwrite=overwrite, result=record) as folder:
        write_adapter(folder, adapter)
    return replace(started, **record, reused=False)


def _base_of(statistics: Statistics) -> BaseModel:
    return BaseModel(str(statistics.provenance.get("base", "")), statistics.provenance.get("revision"))


def _of_kind(kind: str, files: Sequence[Path]) -> dict[str, str]:
    """Hashes by the files' names, which may lie in folders of their own and be called alike."""
    found: dict[str, str] = {}
    for path in files:
        name = f"{kind} {path.name}"
        alike = sum(key == name or key.startswith(f"{name} #") for key in found)
        found[f"{name} #{alike + 1}" if alike else name] = sha256_file(path)
    return found


def move_from_files(
    folder: Path,
    files: StatisticsFiles,
    settings: InitialSettings,
    out: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
) -> Moved:
    """Move a trained adapter into a subspace of its task and write the result.

    Args:
        folder: The trained adapter.
        files: Statistics of its task, on which B is fitted again in closed form, and of the others.
        settings: Method, rank, options, background's weight; alpha, task type and targets are the adapter's own.
        out: The folder to write.
        seed: Of methods that draw at random.
        device: Where the subspace is sought.
        overwrite: Replace what stands there.
    """
    where = device_named(device)
    require_apart(out, [folder, *files.paths()])
    adapter = read_adapter(folder)
    task, statistics, pools = files.opened()
    options: dict[str, Any] = {"method": settings.method, "rank": settings.rank, "options": dict(settings.options)}
    if pools:
        options["background_weight"] = settings.background_weight
    inputs = {"adapter": adapter.source["sha256"], **files.hashes()}
    wanted = identity("post", options, inputs, seed)
    if is_done(out, wanted, overwrite=overwrite):
        moved = from_json(Moved, (read_manifest(out) or {})["result"], str(out))
        return replace(moved, output=str(out.absolute()), reused=True)
    spaces = compute_subspaces(
        settings.method,
        statistics,
        tasks=[task],
        rank=settings.rank,
        options=settings.options,
        seed=seed,
        background=pools or None,
        background_weight=settings.background_weight,
        device=where,
        weights=base_weights(_base_of(statistics[task]), statistics[task]),
    )
    inside, shares = move_into(adapter, spaces[task], statistics=statistics[task])
    worst = min(shares, key=lambda m: shares[m])
    mean = sum(shares.values()) / len(shares)
    moved = Moved(adapter.name, settings.method, settings.rank, mean, (worst, shares[worst]))
    with staged_folder(out, wanted, overwrite=overwrite, result=to_json(moved)) as stage:
        write_adapter(stage, inside)
    return replace(moved, output=str(out.absolute()))
