"""The stages one by one: init, train, eval."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.border.records import to_json
from plait.cli.option_checks import without
from plait.cli.options import Device, FourBits, Json, Out, Overwrite, Quiet, Root, Seed, Set
from plait.cli.output import emit, numbers, settings, table
from plait.cli.source import (
    Base,
    Described,
    Kind,
    Label,
    Recipe,
    Targets,
    Task,
    Text,
    Train,
    Validation,
    in_four_bits,
    settings_from,
)
from plait.errors import UsageError

if TYPE_CHECKING:
    from plait.runs.single.evaluate import Evaluated, TaskScore
    from plait.runs.single.start import Started

Own = Annotated[Path, typer.Option("--own", help="Statistics of the adapter's own task.")]
Others = Annotated[list[Path] | None, typer.Option("--others", help="Statistics of another task; may be repeated.")]
More = Annotated[list[Path] | None, typer.Argument(help="More statistics of others: --others pool/* works.")]
Background = Annotated[list[Path] | None, typer.Option("--background", help="Statistics of public text.")]
Share = Annotated[
    float, typer.Option("--background-weight", min=0, max=1, help="Share of the background among the others.")
]
Subspace = Annotated[str, typer.Option("--method", "-m", help="See `plait ls subspaces`.")]
_STATISTICS = (
    "Statistics of this task and of others; repeat. Training is then penalised for shifting the others' outputs, unless the recipe or "
    "--set names a training.constraint; free without."
)


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command("init")(init)
    app.command()(post)
    app.command()(train)
    app.command("eval")(evaluate)


def init(
    context: typer.Context,
    own: Own,
    out: Out,
    more: More = None,
    others: Others = None,
    background: Background = None,
    background_weight: Share = 0.5,
    method: Subspace = "contrastive",
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the adapter.")] = 8,
    alpha: Annotated[
        float, typer.Option("--alpha", help="LoRA's alpha; the update is multiplied by alpha / rank.")
    ] = 16.0,
    row_norm: Annotated[float | None, typer.Option("--row-norm", help="Norm of each row of A.")] = None,
    task_type: Annotated[
        str | None,
        typer.Option("--task-type", help="PEFT's; by default that of the model behind the statistics."),
    ] = None,
    trainer: Annotated[
        str | None, typer.Option("--for", help="Also print what axolotl, llama-factory, unsloth or trl needs.")
    ] = None,
    sets: Set = None,
    device: Device = "cpu",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write an adapter that is ready to train, from statistics. A lies in its subspace, B is zero; no base is loaded."""
    from plait.runs.single.start import StatisticsFiles, initialise_from_files
    from plait.subspaces.start import InitialSettings, completion_note

    if not background:
        without(context, "an init without --background", ["background_weight"])
    if trainer is not None:
        from plait.training.snippets import require_trainer

        require_trainer(trainer, task_type)  # before anything is read
    chosen = InitialSettings(method, rank, alpha, row_norm, settings(sets), background_weight, task_type)
    files = StatisticsFiles(own, [*(others or []), *(more or [])], background or [])
    started = initialise_from_files(
        files, chosen, out, seed=seed, device=device, overwrite=overwrite, trainer=trainer, quiet=quiet
    )
    reused = " (was there already)" if started.reused else ""
    pools = f" and background at weight {started.background_weight:g}" if started.background_weight is not None else ""
    text = f"{started.task}: {method} against {', '.join(started.others) or 'nobody'}{pools} -> {out}{reused}"
    if started.completed:
        text += f"\nwarning: {completion_note(started.task, started.completed)}"
    if trainer is not None:
        from plait.training.snippets import snippet

        started = replace(started, snippet=snippet(trainer, out, own=own, others=files.others))
        text += f"\n\n{started.snippet}"
    else:
        text += f"\n\n{_next_step(started, out, [own, *files.others])}"
    emit(started, as_json, text)


def _next_step(started: Started, initial: Path, statistics: Sequence[Path]) -> str:
    """What trains the adapter, as typed at a prompt."""
    words = ["plait", "train", str(initial), "--task", started.task]
    if started.base:
        words += ["--base", started.base]
    if started.others:
        words += [str(p) for s in statistics for p in ("--statistics", s)]
    words += ["--out", f"{initial}-trained"]
    where = "--root FOLDER for a GLUE task, --train-file and --text for your own; another trainer: --for TRAINER"
    return f"next: {shlex.join(words)}\n({where})"


def post(
    context: typer.Context,
    adapter: Annotated[Path, typer.Argument(help="A trained adapter folder.")],
    own: Own, out: Out,
    others: Others = None, more: More = None, background: Background = None, background_weight: Share = 0.5,
    method: Subspace = "contrastive",
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the adapter.")] = 8,
    sets: Set = None, device: Device = "cpu", seed: Seed = 0, overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Move a trained adapter into its task's subspace. B is fitted again from statistics; says how much is kept."""
    from plait.runs.single.start import StatisticsFiles, move_from_files
    from plait.subspaces.start import InitialSettings

    if not background:
        without(context, "a post without --background", ["background_weight"])
    chosen = InitialSettings(method, rank, options=settings(sets), background_weight=background_weight)
    files = StatisticsFiles(own, [*(others or []), *(more or [])], background or [])
    moved = move_from_files(adapter, files, chosen, out, seed=seed, device=device, overwrite=overwrite)
    worst, share = moved.worst_module
    kept = f"{100 * moved.energy_kept:.1f} % of the update's energy kept, least in {worst} ({100 * share:.1f} %)"
    reused = " (was there already)" if moved.reused else ""
    emit(moved, as_json, f"{moved.task} into {method}, rank {rank}: {kept} -> {out}{reused}")


def train(
    initial: Annotated[list[str], typer.Argument(help="An adapter folder to start from; several with --fleet.")],
    out: Out,
    task: Task = "",
    fleet: Annotated[bool, typer.Option("--fleet", help="Train DIR or NAME=DIR each in one process, into OUT/NAME.")] = False,
    recipe: Recipe = None, base: Base = None, root: Root = None, train_file: Train = None, validation: Validation = None,
    text: Text = None, label: Label = None, kind: Kind = None, targets: Targets = None,
    sets: Set = None, device: Device = "auto", four_bits: FourBits = None,
    statistics: Annotated[list[Path] | None, typer.Option("--statistics", help=_STATISTICS)] = None,
    seed: Seed = 0, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Fine-tune an adapter on one task, or many at once (--fleet).

    With the Hugging Face Trainer; --set training.steps=200 and so on; without a recipe 3 epochs.

    Give it the --statistics that `plait init` had: what it learns then disturbs the other tasks less once merged.

    On several GPUs: PYTHONSAFEPATH=1 torchrun --nproc_per_node 2 -m plait train ... (or accelerate launch --multi_gpu ...), with
    --set training.shard_base=true to split the base.

    With --fleet many adapters share the base's passes: each trains --task, or the task it is named after; a list
    training.lr trains each at every rate.
    """
    from plait.runs.single.train import train_many, train_one

    if not task and not (fleet and recipe):
        raise UsageError(
            "which task?", hint="--task NAME; with --fleet and --recipe each adapter's name may be its task"
        )
    if len(initial) > 1 and not fleet:
        raise UsageError("one adapter at a time", hint="--fleet trains several")
    if targets:
        raise UsageError("--target-modules: an adapter trains the modules that it has", hint="plait init chooses them")
    described = Described(task, base, root, train_file, validation, text, label, kind)
    chosen = settings_from(recipe, described, [*in_four_bits(four_bits), *(sets or [])], device)
    if validation is not None:
        from plait.runs.session import Session

        Session(chosen).validation(task)  # not trained on, yet not to be passed over: it must be what it is said to be
    how: dict[str, Any] = {"seed": seed, "overwrite": overwrite, "quiet": quiet, "statistics": statistics or []}
    if fleet:
        adapters = train_many(chosen, initial, task, out, **how)
        lines = [f"{a.name}: {a.task}, {a.constraint} -> {a.output}" for a in adapters]
        result = {"output": str(out.absolute()), "adapters": [to_json(a) for a in adapters]}
        emit(result, as_json, "\n".join(lines))
    elif trained := train_one(chosen, Path(initial[0]), task, out, **how):  # nothing in torchrun's other processes
        spent = f"in {trained.result['seconds']:.0f} s"
        emit(trained, as_json, f"{task}: trained ({trained.constraint}) {spent} -> {out}")


def evaluate(
    folders: Annotated[list[str], typer.Argument(help="Adapter folders, DIR or NAME=DIR, alone or merged.")],
    recipe: Recipe = None, base: Base = None, root: Root = None, task: Task = "", train_file: Train = None,
    validation: Validation = None, text: Text = None, label: Label = None, kind: Kind = None, sets: Set = None,
    device: Device = "auto", four_bits: FourBits = None,
    scales: Annotated[str | None, typer.Option("--scales", help="Grid (0.3,0.5,1): chosen on one half, reported on the other.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the long table (jsonl) here.")] = None,
    overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Score adapters on the tasks whose heads they carry. Beside each stands the floor: the base with that head alone.

    Rows of a classifier's are given by --validation-file and --text; text tasks want their --train-file too, whose answers are known.
    """
    from plait.runs.single.evaluate import base_of, evaluate_folders

    base = base or (base_of(folders) if recipe is None else None)
    described = Described(task, base, root, train_file, validation, text, label, kind).to_score()
    chosen = settings_from(recipe, described, [*in_four_bits(four_bits), *(sets or [])], device)
    evaluated = evaluate_folders(
        chosen, folders, scales=numbers(scales, "--scales"), out=out, overwrite=overwrite, task=task, quiet=quiet
    )
    emit({"adapters": [to_json(a) for a in evaluated]}, as_json, _scores_text(evaluated))


def _scores_text(adapters: Sequence[Evaluated]) -> str:
    rows = [
        [a.adapter, task, " and ".join(s.metrics), f"{a.scale:g}", _with_error(s), f"{s.floor:.1f}", str(s.n)]
        for a in adapters
        for task, s in a.tasks.items()
    ]
    left = [
        f"{a.adapter}: not scored, the recipe has no task of that name: {', '.join(a.without_task)}"
        for a in adapters
        if a.without_task
    ]
    return "\n".join(
        [table(["adapter", "task", "score is", "scale", "score", "floor", "rows"], rows, text_columns=3), *left]
    )


def _with_error(score: TaskScore) -> str:
    """A score in percent, of a share of right answers with its standard error."""
    if len(score.metrics) != 1 or not score.metrics.keys() <= {"accuracy", "exact_match"}:
        return f"{score.score:.1f}"
    share = score.score / 100
    return f"{score.score:.1f} ± {100 * math.sqrt(share * (1 - share) / score.n):.1f}"
