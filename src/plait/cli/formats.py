"""Commands about adapters that exist, or lie in a model: inspect, convert, edit, extract."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.merging import merge_text, named_files
from plait.cli.options import Device, Json, Out, Overwrite
from plait.cli.output import emit

Adapter = Annotated[Path, typer.Argument(help="A PEFT folder, a folder of them by component, or a LoRA file.")]
Stats = Annotated[list[Path] | None, typer.Option("--stats", help="TASK=FILE, where the method needs them.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    for command in (inspect, convert, edit, extract):
        app.command()(command)


def inspect(adapter: Adapter, as_json: Json = False) -> None:
    """Say what an adapter is and what can be done with it. Its base is not needed."""
    from plait.formats.inspect import inspect as look

    found = look(adapter)
    emit(found, as_json, inspection_text(found))


def convert(
    adapter: Adapter,
    out: Out,
    to: Annotated[str, typer.Option("--to", help="peft, kohya, diffusers or mlx.")] = "peft",
    component: Annotated[str | None, typer.Option("--component", help="What a PEFT folder adapts: unet, text_encoder, ...")] = None,
    base: Annotated[Path | None, typer.Option("--base", help="Folder of the base: for DoRA, trained embeddings and GGUF files.")] = None,
    initial: Annotated[Path | None, typer.Option("--initial", help="The adapter before training: for PiSSA and kin.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="For what is not low rank; the error is printed.")] = None,
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
    found = change(
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
    emit(found, as_json, conversion_text(found))


def extract(
    finetuned: Annotated[Path, typer.Argument(help="Folder of a fully fine-tuned model, or its name on the hub.")],
    base: Annotated[Path, typer.Option("--base", help="Folder of the model it was trained from, or its name on the hub.")],
    out: Out,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of every module.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Share of each module's squared change to keep.")] = None,
    target_modules: Annotated[str | None, typer.Option("--target-modules", help="Endings of names; all layers by default.")] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Leave out what else changed: norms, biases, embeddings.")] = False,
    stats: Annotated[Path | None, typer.Option("--stats", help="The base's statistics: cut in the metric of the inputs.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of power iterations, which only large matrices need.")] = 0,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Take the best LoRA out of a full fine-tune; say what it keeps."""
    from plait.extraction.extract import Extraction
    from plait.extraction.extract import extract as take

    targets = tuple(t for t in target_modules.split(",") if t) if target_modules else None
    ask = Extraction(finetuned, base, rank, energy, targets, drop, stats, seed)
    found = take(ask, out, overwrite=overwrite)
    emit(found, as_json, extraction_text(found))


def edit(
    merged: Annotated[Path, typer.Argument(help="A merge that plait wrote.")],
    out: Out,
    add: Annotated[list[str] | None, typer.Option("--add", help="An adapter, PATH or NAME=PATH; may be repeated.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="Name of one of its adapters.")] = None,
    weight: Annotated[list[str] | None, typer.Option("--weight", metavar="NAME=W", help="A new weight.")] = None,
    moved: Annotated[list[str] | None, typer.Option("--input", metavar="NAME=PATH", help="Where an input is now.")] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="Of the merge; as it was by default.")] = None,
    stats: Stats = None,
    by_difference: Annotated[bool, typer.Option("--by-difference", help="Linear methods: only what changes is read.")] = False,
    device: Device = "cpu",
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Change a merge: add adapters, take some out, weigh them anew. From the recipe that it recorded."""
    from plait.cli.existing import auto_text
    from plait.errors import UsageError
    from plait.fidelity.again import choose_again
    from plait.merging.edit import Change, recorded_choice
    from plait.merging.request import edit as change

    weights = {n: _number(v, n) for n, v in _pairs(weight, "--weight").items()}
    places = {n: Path(p) for n, p in _pairs(moved, "--input").items()}
    wanted = Change(add or [], remove or [], weights, places, scale, named_files(stats))
    if (recipe := recorded_choice(merged)) is not None:
        if by_difference or device != "cpu":
            raise UsageError("what merge auto chose is chosen anew, on the CPU: no --by-difference or --device with it")
        written = choose_again(recipe, wanted, out, overwrite=overwrite)
        emit(written, as_json, auto_text(written))
    else:
        found = change(merged, wanted, out, by_difference=by_difference, device=device, overwrite=overwrite)
        emit(found, as_json, merge_text(found))


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


def inspection_text(found: dict[str, Any]) -> str:
    """What an adapter is, a line per fact."""
    several = found.get("components") or found.get("adapters")
    if several:
        shown = [f"{place}\n{inspection_text(facts)}" for place, facts in several.items()]
        none = [] if "components" in found else [f"{found['path']}: no adapter itself, {len(several)} in folders of it"]
        return "\n\n".join([*none, *shown])
    lines = [f"{found['name']}: {found['variant']}, {found['format'] or 'unknown format'}"]
    lines.append(f"  base       {found['base'] or 'not recorded'}")
    if found["task_type"]:
        lines.append(f"  task type  {found['task_type']}")
    lines += _figures(found) if "modules" in found else []
    lines.append(f"  size       {found['size_mb']:.2f} MB, {', '.join(found['dtypes'])}")
    if found["merged_from"]:
        lines.append(f"  merge of   {', '.join(found['merged_from'])} ({found['method']})")
    if found["stacked_on"]:
        lines.append(f"  on top of  {found['stacked_on']}")
    lines += [f"  inside     {place}: an adapter of its own" for place in found.get("inside", [])]
    if found["problem"]:
        lines.append(f"  problem    {found['problem']}")
    return "\n".join([*lines, *(f"  can        {c}" for c in found["can"] or ["nothing here: serve it as it is"])])


def _figures(found: dict[str, Any]) -> list[str]:
    """The lines about modules, ranks and what lies beside them."""
    lines: list[str] = []
    lines.append(f"  modules    {found['modules']}: {_counts(found['targets'])}")
    if list(found["module_kinds"]) != ["linear"]:
        lines.append(f"  kinds      {_counts(found['module_kinds'])}")
    lines.append(f"  rank       {_counts(found['ranks'])}")
    lines.append(f"  alpha      {_counts(found['alphas'])}")
    if found["without_alpha"]:
        lines.append(
            f"             {found['without_alpha']} modules came without: alpha = rank, as their loaders take it"
        )
    if found["alpha_from"]:
        lines.append(f"             from {' and '.join(found['alpha_from'])}")
    lines.append(f"  |update|   {found['update_norm']:.4g}" + (
        f", zero in {found['zero_modules']} modules" if found["zero_modules"] else ""
    ))  # fmt: skip
    if found["heads"]:
        lines.append(f"  heads      {', '.join(found['heads'])}")
    if found["extras"]:
        lines.append(f"  beside     {', '.join(found['extras'])}: trained whole")
    if found["copies"]:
        lines.append(f"  copies     {', '.join(found['copies'])}: the base's own, not trained")
    return lines


def _counts(counts: dict[str, int]) -> str:
    """One value, or each with how many have it, the commonest first."""
    if len(counts) == 1:
        return next(iter(counts))
    shown = sorted(counts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{k} ({n})" for k, n in shown[:12]) + (", ..." if len(shown) > 12 else "")


def conversion_text(found: dict[str, Any]) -> str:
    """What a conversion did, and at what price."""
    lines = [f"{found['from']} -> {found['to']}, {found['modules']} modules -> {found['output']}"]
    if found.get("reused"):
        return lines[0] + " (was there already)"
    for done in found["conversions"]:
        price = (
            "exact"
            if done["exact"]
            else f"relative error {done['relative_error']:.3g}"
            if "relative_error" in done
            else "not exact"
        )
        lines.append(f"{done['what']}: {price}" + (f" at rank {done['rank']}" if "rank" in done else ""))
        if not done["exact"] and "errors_at" in done:
            more = ", ".join(f"{e:.3g} at {r}" for r, e in list(done["errors_at"].items())[1:])
            lines.append(
                f"  a higher --rank would leave {more}; worst here {done['worst']['module']} ({done['worst']['relative_error']:.3g})"
            )
    if found["folded"]:
        lines.append(f"scalings of {found['folded']} modules multiplied into B: {found['to']} cannot express them")
    if found["rounding_error"] is not None:
        lines.append(f"rounding took {100 * found['rounding_error']:.2g} % of the update")
    lines += found["notes"]
    return "\n".join([*lines, f"verified: read again, largest error {found['verification_error']:.1e}"])


def extraction_text(found: dict[str, Any]) -> str:
    """What was extracted, and what was left out."""
    ranks = sorted({row["rank"] for row in found["by_module"].values()})
    said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    worst = found["worst_module"]
    lines = [
        f"{found['modules']} modules at {said} -> {found['output']}",
        f"keeps {found['energy_kept']:.4%} of the squared change (relative error {found['relative_error']:.3g}); "
        f"least {worst['energy_kept']:.4%}, of {worst['name']}",
    ]
    if found["metric_kept"] is not None:
        lines.append(f"in the metric of the inputs {found['metric_kept']:.4%}")
    if found["unchanged"]:
        lines.append(f"{found['unchanged']} modules did not change")
    if found["heads"]:
        lines.append("the head is kept whole")
    if dropped := found["dropped"]:
        lines.append(
            f"left out: {len(dropped)} tensors that changed and are not covered, {', '.join(list(dropped)[:3])} ..."
        )
    if found["without_statistics"]:
        lines.append(f"cut without the metric, having no statistics: {len(found['without_statistics'])} modules")
    if found["verification_error"] is not None:
        lines.append(f"verified: read again, loses what was stated to {found['verification_error']:.1e}")
    return "\n".join(lines)
