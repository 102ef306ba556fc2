"""Training at a prompt: one adapter folder by the Hugging Face Trainer, or many as a fleet, by a recipe's settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.adapters.lineage import same_name
from plait.adapters.naming import checked_name
from plait.adapters.peft_format import read_adapter
from plait.border.counts import plural
from plait.border.records import inline, optional
from plait.disk.hub import adapter_place, name_of
from plait.disk.store import identity, read_manifest, sha256_file
from plait.errors import UsageError
from plait.model.ranks import is_writer, world_size
from plait.progress import Progress, note
from plait.recipes.recipe import Settings, at_each_rate
from plait.recipes.recipe_file import require_known
from plait.recipes.sections import ArmSpec
from plait.runs.lengths import say_of_rows
from plait.runs.session import Session
from plait.statistics.lazy import task_recorded

if TYPE_CHECKING:
    from plait.statistics import Statistics
    from plait.training import Member


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained adapter.

    Args:
        output: Its folder, absolute.
        constraint: What kept it while it was trained.
        task: Its task.
        name: What it is called in a fleet.
        result: What its manifest says of the training: losses, steps, seconds and more.
    """

    output: str
    constraint: str
    task: str
    name: str | None = optional()
    result: Mapping[str, Any] = inline()

    @classmethod
    def of(cls, member: Member, name: str | None = None) -> Trained:
        """The record of a member whose folder is written."""
        result = dict((read_manifest(member.out) or {}).get("result", {}))
        result.pop("task", None)
        return cls(str(member.out.absolute()), member.settings.constraint, member.task.name, name, result)


def train_one(
    settings: Settings,
    initial: Path,
    task: str,
    out: Path,
    *,
    seed: int,
    overwrite: bool,
    quiet: bool,
    statistics: Sequence[Path] = (),
) -> Trained | None:
    """Fine-tune one adapter folder on one task of a recipe; under torchrun, in all of its processes together.

    Args:
        settings: Base, data, tasks and the training's settings.
        initial: The folder to start from.
        task: Which of the recipe's tasks.
        out: The folder to write.
        seed: Of the head and the order of the rows.
        overwrite: Train even where `out` holds something.
        quiet: No progress on stderr.
        statistics: Files of this task and of others. Where there are any and the recipe names no constraint, training is
            "penalised" (beta 1): a penalty keeps the others' outputs in place. Without any, and where the recipe says
            "free" or "frozen", nothing is made of them.

    Returns:
        The record; None in every process but torchrun's first.
    """
    from plait.training import train_member

    settings = _with_constraint(settings, statistics)
    session = Session(settings)
    require_known(task, list(session.tasks), "task")
    arms = _rates(settings)
    if len(arms) > 1:
        raise UsageError(
            f"{len(arms)} learning rates for one adapter", where="training.lr", hint="one rate, or --fleet"
        )
    m = _member(session, initial, task, out, arms[0], seed, _open(statistics))
    if is_writer():
        say_of_rows(session, task, m.examples, split="train")
    progress = Progress(1.0, 1, quiet or not is_writer())
    progress.start(f"train {task}", 1.0)
    train_member(
        m,
        session.base,
        overwrite=overwrite,
        progress=lambda step, steps, loss: progress.within(step / max(1, steps), f"step {step} of {steps}"),
    )
    progress.close(f"trained {task}")
    if not is_writer():
        return None
    return Trained.of(m)


def train_many(
    settings: Settings,
    folders: Sequence[str],
    task: str,
    out: Path,
    *,
    seed: int,
    overwrite: bool,
    quiet: bool,
    statistics: Sequence[Path] = (),
) -> list[Trained]:
    """Fine-tune many adapter folders of one base as a fleet: each ends as `train_one` would have left it, to rounding.

    Args:
        settings: Base, data, tasks and the training's settings; a list of learning rates trains every adapter at each.
        folders: ``DIR`` or ``NAME=DIR``; the name is the adapter's folder in `out`, and its task unless one is given.
        task: The task of all of them; "" for each its own.
        out: Holds one folder each, ``NAME`` or ``NAME@lrRATE``.
        seed: Of the heads and the order of the rows.
        overwrite: Train even where a folder holds something.
        quiet: No progress on stderr.
        statistics: Files of the tasks, as for `train_one`.

    Raises:
        UsageError: Two of one name, an unknown task, several processes.
    """
    from plait.training import train_fleet

    if world_size() > 1:
        raise UsageError("a fleet is trained in one process", hint="without torchrun, or without --fleet")
    settings, known = _with_constraint(settings, statistics), _open(statistics)
    session, arms, members = Session(settings), _rates(settings), {}
    for given in folders:
        name, equals, place = given.partition("=")
        folder = Path(place if equals else given)
        name = checked_name(name if equals else name_of(adapter_place(folder)), "adapter")
        require_known(task or name, list(session.tasks), "task")
        for arm in arms:
            full = f"{name}@{arm.name.rpartition('@')[2]}" if len(arms) > 1 else name
            if full in members:
                raise UsageError(f"two adapters are called {name!r}", hint="NAME=DIR")
            members[full] = _member(session, folder, task or name, out / full, arm, seed, known)
    for one in {m.task.name: m for m in members.values()}.values():
        say_of_rows(session, one.task.name, one.examples, split="train")
    progress = Progress(1.0, len(members), quiet)
    progress.start(f"{plural(len(members), 'adapter')} together", 1.0, len(members))
    train_fleet(
        list(members.values()),
        session.base,
        overwrite=overwrite,
        progress=lambda step, steps, loss: progress.within(step / max(1, steps), f"step {step} of {steps}"),
    )
    progress.close(f"trained {plural(len(members), 'adapter')}")
    return [Trained.of(m, name) for name, m in members.items()]


def _rates(settings: Settings) -> list[ArmSpec]:
    """What single trainings are set by: the recipe's first arm, or the settings alone, at each learning rate."""
    return at_each_rate(settings, settings.first_arm or ArmSpec(name="adapter"))


def _with_constraint(settings: Settings, statistics: Sequence[Path]) -> Settings:
    """The settings, with the constraint that statistics are given for where they name none."""
    from plait.training.settings import WITH_STATISTICS

    named = {**settings.training, **(settings.first_arm.training if settings.first_arm else {})}
    if not statistics or "constraint" in named:
        return settings
    return settings.model_copy(update={"training": {**settings.training, "constraint": WITH_STATISTICS}})


def _open(files: Sequence[Path]) -> tuple[dict[str, Statistics] | None, dict[str, str]]:
    """Statistics by task, their sites still in the files, and the files' hashes as an identity has them."""
    from plait.statistics import open_statistics

    known: dict[str, Statistics] = {}
    for path in files:
        found = open_statistics(path)
        if (task := task_recorded(found, path)) in known:
            raise UsageError(f"two statistics files of task {task!r}", where=str(path), hint="name every task once")
        known[task] = found
    return known or None, {f"statistics/{i}": sha256_file(path) for i, path in enumerate(files)}


def _member(
    session: Session,
    folder: Path,
    task: str,
    out: Path,
    arm: ArmSpec,
    seed: int,
    statistics: tuple[dict[str, Statistics] | None, dict[str, str]],
) -> Member:
    from plait.model.identity import base_facts
    from plait.statistics.agreement import require_base
    from plait.training import Member
    from plait.training.settings import identity_of

    settings = session.recipe.training_of(arm)
    start = read_adapter(folder, name=task)
    if start.base and not same_name(start.base, session.base.name) and is_writer():
        note(
            f"{folder} names {start.base} as its base; it is trained on {session.base.name}, and names that from here on"
        )
    inputs = {"initial": start.source["sha256"], "base": session.base_sha256}
    options: dict[str, Any] = {
        "training": identity_of(settings),
        "data": session.data_identity(task),
        "rows": session.recipe.data.train_rows,
    }
    base, kept = session.recipe.base, session.recipe.data.selection_rows
    options |= {"dtype": base.dtype} if base.dtype != "float32" else {}  # older folders of float32 stay what they were
    options |= {"selection": kept} if kept is not None or settings.evaluate_every else {}
    known, hashes = statistics
    if settings.constraint not in ("free", "frozen"):  # else they have no part in the result
        inputs |= hashes
        for found in (known or {}).values():
            require_base(found, session.base.name, base_facts(session.base))
    return Member(
        start,
        session.tasks[task],
        session.training(task, seed),
        settings,
        seed,
        out,
        identity("adapter", options, inputs, seed),
        known,
        session.selection(task, seed) if settings.evaluate_every else None,
    )
