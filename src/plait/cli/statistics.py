"""Statistics: collecting them, and the file as a thing of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.border.counts import plural
from plait.cli.options import Device, FourBits, Json, Overwrite, Root, Seed, Set
from plait.cli.output import emit, table
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
    from plait.statistics.inspect import SiteDifference, SiteSummary

File = Annotated[Path, typer.Argument(help="A statistics file.")]
Files = Annotated[list[Path], typer.Argument(help="Statistics files.")]
NewFile = Annotated[Path, typer.Option("--out", help="The file to write.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    group = typer.Typer(
        rich_markup_mode=None,
        short_help="Collect statistics of a task's layer inputs, and handle the files.",
        subcommand_metavar="[COMMAND]",
    )
    group.callback(invoke_without_command=True)(collect)
    for command in (show, merge, diff, compress, check, fisher):
        group.command()(command)
    app.add_typer(group, name="stats")


def collect(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option("--out", help="The file, TASK.stats.safetensors.")] = None,
    recipe: Recipe = None, base: Base = None, task: Task = "", root: Root = None, train_file: Train = None,
    validation: Validation = None, text: Text = None, label: Label = None, kind: Kind = None, targets: Targets = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Training rows to look at; 100 by default.")] = None,
    pool: Annotated[str | None, typer.Option("--pool", help="token (default) or mean.")] = None,
    sketch: Annotated[int | None, typer.Option("--sketch", min=1, help="Keep K directions per site, not the whole moment.")] = None,
    memory: Annotated[str | None, typer.Option("--memory", help="Bytes for the sums (2GB): chooses how they are held.")] = None,
    output_gradients: Annotated[bool, typer.Option("--output-gradients", help="Of output gradients too (K-FAC's G).")] = False,
    sets: Set = None, device: Device = "auto", four_bits: FourBits = None, seed: Seed = 0, overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Collect a task's statistics: what it feeds into every target module. The file can be shared instead of the data.

    With --out it collects; a command looks at files or writes others.

    On several GPUs: PYTHONSAFEPATH=1 torchrun --nproc_per_node 2 -m plait stats ...; each process reads its share.
    """
    if context.invoked_subcommand is not None:
        return
    from plait.runs.single.collect import collect_one
    from plait.statistics.budget import bytes_of

    if out is None:
        raise UsageError("where to?", hint="--out TASK.stats.safetensors")
    if memory is not None and output_gradients:
        hint = "--memory is for moments of inputs alone; --sketch K makes both smaller"
        raise UsageError("--memory and --output-gradients exclude each other", hint=hint)
    if memory is not None and sketch is not None:
        hint = "--memory chooses the form itself; leave out --sketch, or give it alone"
        raise UsageError("--memory and --sketch exclude each other", hint=hint)
    extra = [f"statistics.samples={samples}"] if samples else []
    extra += [f"statistics.pool={pool}"] if pool else []
    extra += [f"statistics.sketch={sketch}"] if sketch else []
    extra += [f"statistics.memory={bytes_of(memory)}"] if memory is not None else []
    extra += ["statistics.output_gradients=true"] if output_gradients else []
    described = Described(task, base, root, train_file, validation, text, label, kind)
    chosen = settings_from(
        recipe, described, [*in_four_bits(four_bits), *extra, *(sets or [])], device, targets=targets, adapts=True
    )
    collected = collect_one(chosen, task, out, seed=seed, overwrite=overwrite)
    if collected is None:  # not torchrun's first process
        return
    if collected.memory:
        way, needed, allowed = (collected.memory[k] for k in ("chosen", "needed", "allowed"))
        typer.echo(f"memory: {way}, {needed:,} of {plural(allowed, 'byte')}", err=True)
    more = f", output gradients of {plural(collected.output_gradients, 'module')}" if collected.output_gradients else ""
    counts = [(collected.samples, "row"), (collected.tokens, "token"), (collected.sites, "site")]
    line = f"{task}: {', '.join(plural(n or 0, what) for n, what in counts)}{more} -> {out}"
    emit(collected, as_json, line + _before(collected.reused))


def show(file: File, as_json: Json = False) -> None:
    """Show what a statistics file holds: base, sites, tokens, spectra."""
    from plait.statistics import read_statistics, show_statistics

    contents = show_statistics(read_statistics(file))
    known = {key: value for key, value in sorted(contents.provenance.items()) if value is not None}
    width = max(map(len, known), default=0)
    facts = "\n".join(f"{key.ljust(width)}  {value}" for key, value in known.items())

    def row(name: str, s: SiteSummary) -> list[str]:
        return [name, str(s.dim), str(s.count), s.form, f"{s.effective_rank:.1f}", f"{100 * s.top8:.1f} %"]

    header = ["site", "width", "tokens", "form", "effective rank", "in top 8"]
    rows = [[*row(site, s), str(len(s.readers))] for site, s in contents.sites.items()]
    tables = [table([*header, "readers"], rows)]
    if contents.output_gradients:
        tables.append(table(["output gradients of", *header[1:]], [row(*g) for g in contents.output_gradients.items()]))
    emit(contents, as_json, "\n\n".join([facts, *tables]))


def merge(files: Files, out: NewFile, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Add up statistics files of one base. More rows of a task, or several tasks as one pool."""
    from plait.runs.single.pooled import merge_files

    pooled = merge_files(files, out, overwrite=overwrite)
    if pooled.dropped_output_gradients:
        typer.echo("note: without output gradients, which not all files hold of the same modules", err=True)
    emit(pooled, as_json, f"{plural(len(files), 'file')} -> {out}" + _before(pooled.reused))


def diff(a: File, b: File, as_json: Json = False) -> None:
    """Compare two statistics files, and say whether they can be mixed."""
    from plait.statistics import diff_statistics, read_statistics

    difference = diff_statistics(read_statistics(a), read_statistics(b))
    facts = "\n".join(f"{key}: {x} | {y}" for key, (x, y) in difference.provenance.items())

    def row(name: str, s: SiteDifference) -> list[str]:
        return [name, f"{s.overlap:.4f}", f"{s.mean_cosine:.4f}", f"{s.relative_difference:.4f}"]

    verdict = "can be mixed" if difference.compatible else f"cannot be mixed: {difference.reason}"
    if difference.compatible and difference.drops_output_gradients:
        one = "they hold those of different modules" if difference.output_gradients else "only one of them holds any"
        verdict += f", without output gradients: {one}"
    header = ["site", "overlap", "cosine of means", "relative difference"]
    parts = [verdict, facts, table(header, [row(*s) for s in difference.sites.items()])]
    if difference.output_gradients:
        rows = [row(*g) for g in difference.output_gradients.items()]
        parts.append(table(["output gradients of", *header[1:]], rows))
    emit(difference, as_json, "\n\n".join(part for part in parts if part))


def compress(
    file: File, out: NewFile,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Directions kept per site, beside the tail.")] = 64,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Write a smaller file, its error recorded. It keeps the largest directions of each site and an 8-bit tail of the rest."""
    from plait.runs.single.pooled import compress_file

    small = compress_file(file, out, rank, overwrite=overwrite)
    line = f"{small.bytes_before:,} -> {plural(small.bytes_after, 'byte')}, error at most {small.relative_error:.2e} of a trace"
    emit(small, as_json, line + _before(small.reused))


def check(file: File, as_json: Json = False) -> None:
    """Say whether a file can be what it claims; exit code 3 if not."""
    from plait.statistics import check_statistics, read_statistics

    soundness = check_statistics(read_statistics(file))
    lines = [f"problem: {p}" for p in soundness.problems] + [f"warning: {w}" for w in soundness.warnings]
    emit(soundness, as_json, "\n".join([*lines, "sound" if soundness.ok else "not sound"]))
    if not soundness.ok:
        raise typer.Exit(3)


def fisher(
    adapter: Annotated[str, typer.Argument(help="A trained adapter with its head, DIR or NAME=DIR.")],
    out: NewFile,
    recipe: Recipe = None, base: Base = None, task: Task = "", root: Root = None, train_file: Train = None,
    text: Text = None, label: Label = None, kind: Kind = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Training rows to look at; 100 by default.")] = None,
    labels: Annotated[str, typer.Option("--labels", help="sampled from the model, or given by the data.")] = "sampled",
    sets: Set = None, device: Device = "auto", seed: Seed = 0, overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Collect the diagonal Fisher information of a trained adapter. For `plait merge --method fisher --stats FILE`."""
    from plait.runs.single.fisher import fisher_of_folder

    extra = [f"statistics.samples={samples}"] if samples else []
    described = Described(task, base, root, train_file, None, text, label, kind)
    chosen = settings_from(recipe, described, [*extra, *(sets or [])], device)
    if labels not in ("sampled", "given"):
        raise UsageError(f"--labels {labels!r}, expected sampled or given")
    file = fisher_of_folder(chosen, adapter, task, out, labels=labels, seed=seed, overwrite=overwrite)  # type: ignore[arg-type]
    line = f"{task}: {plural(file.examples, 'row')}, {plural(file.modules, 'module')}, {plural(file.bytes, 'byte')} -> {out}"
    emit(file, as_json, line + _before(file.reused))


def _before(reused: bool) -> str:
    """What a line ends with where nothing was computed."""
    return " (was there already)" if reused else ""
