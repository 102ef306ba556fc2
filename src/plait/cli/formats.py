"""Commands about adapters that exist, or lie in a model: inspect, convert, edit, extract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.border.counts import agreed, plural
from plait.cli.merging import merge_text, named_files
from plait.cli.options import Device, Json, Out, Overwrite
from plait.cli.output import emit

if TYPE_CHECKING:
    from plait.disk.written import Written
    from plait.extraction.outcome import ExtractionRecord
    from plait.formats.convert import ConversionRecord

Adapter = Annotated[Path, typer.Argument(help="A PEFT folder, a folder of them by component, or a LoRA file.")]
Stats = Annotated[list[Path] | None, typer.Option("--stats", help="TASK=FILE, where the method needs them.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    for command in (inspect, convert, edit, extract):
        app.command()(command)


def inspect(
    adapter: Adapter,
    full: Annotated[bool, typer.Option("--full", help="Read the numbers of large PEFT folders too (over 64 MB).")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Say what an adapter is and what can be done with it. Its base is not needed.

    Of large PEFT folders it reads the headers alone; `plait check` looks for damage and NaN.
    """
    from plait.formats.inspect import inspect as look
    from plait.formats.inspect_words import inspection_text

    inspection = look(adapter, full=full)
    emit(inspection, as_json, inspection_text(inspection))


def convert(
    adapter: Adapter,
    out: Out,
    to: Annotated[str, typer.Option("--to", help="peft, kohya, diffusers or mlx.")] = "peft",
    component: Annotated[str | None, typer.Option("--component", help="What a PEFT folder adapts: unet, text_encoder, ...")] = None,
    base: Annotated[Path | None, typer.Option("--base", help="Folder of the base: for DoRA, trained embeddings and GGUF files.")] = None,
    initial: Annotated[Path | None, typer.Option("--initial", help="The adapter before training: for PiSSA and kin.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank for what is not low rank; the error is printed.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float16, bfloat16 or float32; the rounding is printed.")] = None,
    layout: Annotated[str, typer.Option("--layout", help="For kohya: flux, sd3, diffusers, or auto by the base's name.")] = "auto",
    rename: Annotated[list[str] | None, typer.Option("--rename", metavar="OLD=NEW", help="Another beginning of module names.")] = None,
    drop_bias: Annotated[bool, typer.Option("--drop-bias", help="Leave biases of lora_bias out.")] = False,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Write an adapter in another format, or as plain LoRA.

    DoRA and other variants become plain LoRA exactly, or with the error stated.
    """
    from plait.formats.convert import convert as change
    from plait.formats.work import Means

    means = Means(base, initial, rank, drop_bias)
    written = change(
        adapter,
        out,
        to=to,
        means=means,
        component=component,
        dtype=dtype,
        layout=layout,
        rename=rename or [],
        overwrite=overwrite,
    )
    emit(written, as_json, conversion_text(written))


def extract(
    finetuned: Annotated[Path, typer.Argument(help="Folder of a fully fine-tuned model, or its name on the hub.")],
    base: Annotated[Path, typer.Option("--base", help="Folder of the model it was trained from, or its name on the hub.")],
    out: Out,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank of every module.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Share of each module's squared change to keep.")] = None,
    target_modules: Annotated[str | None, typer.Option("--target-modules", help="Endings of names; all layers by default.")] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Leave out what else changed: norms, biases, embeddings.")] = False,
    stats: Annotated[Path | None, typer.Option("--stats", help="The base's statistics: cut in the metric of the inputs.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of power iterations, which only large matrices need.")] = 0,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Take the best LoRA out of a full fine-tune; say what it keeps."""
    from plait.extraction.extract import Extraction
    from plait.extraction.extract import extract as take

    targets = tuple(t for t in target_modules.split(",") if t) if target_modules else None
    ask = Extraction(finetuned, base, rank, energy, targets, drop, stats, seed)
    written = take(ask, out, overwrite=overwrite)
    emit(written, as_json, extraction_text(written))


def edit(
    merged: Annotated[Path, typer.Argument(help="A merge that plait wrote.")],
    out: Out,
    add: Annotated[list[str] | None, typer.Option("--add", help="An adapter, PATH or NAME=PATH; may be repeated.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="Name of one of its adapters.")] = None,
    weight: Annotated[list[str] | None, typer.Option("--weight", metavar="NAME=W", help="A new weight.")] = None,
    moved: Annotated[list[str] | None, typer.Option("--input", metavar="NAME=PATH", help="Where an input is now.")] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="New scale; by default as it was given, or chosen anew.")] = None,
    stats: Stats = None,
    by_difference: Annotated[bool, typer.Option("--by-difference", help="Linear methods: only what changes is read.")] = False,
    device: Device = "cpu",
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Change a merge: add adapters, take some out, weigh them anew. From the recipe that it recorded."""
    from plait.choosing.rechoosing import choose_again
    from plait.cli.existing_words import auto_text
    from plait.errors import UsageError
    from plait.merging.changes import Change, recorded_choice
    from plait.merging.editing import edit as change

    weights = {n: _number(v, n) for n, v in _pairs(weight, "--weight").items()}
    places = {n: Path(p) for n, p in _pairs(moved, "--input").items()}
    wanted = Change(add or [], remove or [], weights, places, scale, named_files(stats))
    if (recipe := recorded_choice(merged)) is not None:
        if by_difference or device != "cpu":
            raise UsageError("what merge auto chose is chosen anew, on the CPU: no --by-difference or --device with it")
        written = choose_again(recipe, wanted, out, overwrite=overwrite)
        emit(written, as_json, auto_text(written))
    else:
        edited = change(merged, wanted, out, by_difference=by_difference, device=device, overwrite=overwrite)
        emit(edited, as_json, merge_text(edited))


def _pairs(given: list[str] | None, option: str) -> dict[str, str]:
    from plait.errors import UsageError

    pairs = [g.partition("=") for g in given or []]
    if wrong := [g for g, (name, eq, value) in zip(given or [], pairs, strict=True) if not (name and eq and value)]:
        raise UsageError(f"{option} {wrong[0]!r} is not NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _number(text: str, name: str) -> float:
    from plait.cli.output import numbers

    found = numbers(text, f"--weight {name}") or []
    if len(found) != 1:
        from plait.errors import UsageError

        raise UsageError(f"--weight {name}={text} is not one number")
    return found[0]


def conversion_text(written: Written[ConversionRecord]) -> str:
    """Say what a conversion did, and at what price."""
    record = written.record
    lines = [f"{record.origin} -> {record.to}, {plural(record.modules, 'module')} -> {written.output}"]
    if written.reused:
        return lines[0] + " (was there already)"
    for step in record.conversions:
        error = "not exact" if step.relative_error is None else f"relative error {step.relative_error:.3g}"
        price = "exact" if step.exact else error
        lines.append(f"{step.what}: {price}" + (f" at rank {step.rank}" if step.rank is not None else ""))
        if not step.exact and step.errors_at and step.worst:
            more = ", ".join(f"{e:.3g} at {r}" for r, e in list(step.errors_at.items())[1:])
            worst = f"{step.worst.module} ({step.worst.relative_error:.3g})"
            lines.append(f"  a higher --rank would leave {more}; worst here {worst}")
    if record.folded:
        lines.append(
            f"scalings of {plural(record.folded, 'module')} multiplied into B: {record.to} cannot express them"
        )
    if record.rounding_error is not None:
        lines.append(f"rounding took {100 * record.rounding_error:.2g} % of the update")
    return "\n".join([*lines, *record.notes, f"verified: read again, largest error {record.verification_error:.1e}"])


def extraction_text(written: Written[ExtractionRecord]) -> str:
    """Say what was extracted, and what was left out."""
    record = written.record
    ranks = sorted({row.rank for row in record.by_module.values()})
    said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    worst = record.worst_module
    lines = [
        f"{plural(record.modules, 'module')} at {said} -> {written.output}",
        f"keeps {record.energy_kept:.4%} of the squared change (relative error {record.relative_error:.3g}); "
        f"least {worst.energy_kept:.4%}, of {worst.name}",
    ]
    if record.metric_kept is not None:
        lines.append(f"in the metric of the inputs {record.metric_kept:.4%}")
    if record.unchanged:
        lines.append(f"{plural(record.unchanged, 'module')} did not change")
    if record.heads:
        lines.append("the head is kept whole")
    if dropped := record.dropped:
        lines.append(
            f"left out: {plural(len(dropped), 'tensor')} that changed and {agreed(len(dropped), 'is', 'are')} not covered, "
            f"{', '.join(list(dropped)[:3])}{' ...' if len(dropped) > 3 else ''}"
        )
    if record.without_statistics:
        lines.append(
            f"cut without the metric, having no statistics: {plural(len(record.without_statistics), 'module')}"
        )
    if record.verification_error is not None:
        lines.append(f"verified: read again, loses what was stated to {record.verification_error:.1e}")
    return "\n".join(lines)
