"""The merge command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.options import Json, Out, Overwrite, Seed, Set
from plait.cli.output import emit, numbers, settings


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command()(merge)


def merge(
    folders: Annotated[
        list[str], typer.Argument(help="PEFT folders, DIR or NAME=DIR each; or one mergekit YAML file.")
    ],
    out: Out,
    method: Annotated[str, typer.Option("--method", "-m", help="See `plait ls merges`.")] = "task_arithmetic",
    sets: Set = None,
    scale: Annotated[float, typer.Option("--scale", help="Multiplies the merged update.")] = 1.0,
    weights: Annotated[str | None, typer.Option("--weights", help="One per adapter: 1,1,0.5 (any sign).")] = None,
    stats: Annotated[
        list[Path] | None, typer.Option("--stats", help="TASK.stats.safetensors or TASK=FILE; may be repeated.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Cut to this rank; the loss is printed.")] = None,
    calibrate: Annotated[str | None, typer.Option("--calibrate", help="pico")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Name of the base, where adapters name it differently.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Read the result again and compare.")] = True,
    seed: Seed = 0,
    device: Annotated[str, typer.Option("--device")] = "cpu",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge LoRA adapters of one base into one adapter; the base itself is not needed."""
    from plait.merging import merge_folders

    trailing = [Path(f) for f in folders if f.endswith(".stats.safetensors")]  # --stats pool/* leaves them here
    found = merge_folders(
        [f for f in folders if not f.endswith(".stats.safetensors")],
        out,
        method=method,
        options=settings(sets),
        weights=numbers(weights, "--weights"),
        scale=scale,
        statistics=named_files([*(stats or []), *trailing]),
        rank=rank,
        calibrate=calibrate,
        seed=seed,
        device=device,
        verify=verify,
        base=base,
        overwrite=overwrite,
    )
    emit(found, as_json, merge_text(found))


def named_files(files: list[Path] | None) -> dict[str, Path] | None:
    """``TASK=FILE``, or files whose name before the first dot is the task."""
    if not files:
        return None
    pairs = [str(f).partition("=") for f in files]
    return {name if eq else Path(name).name.split(".")[0]: Path(path if eq else name) for name, eq, path in pairs}


def merge_text(found: dict[str, Any]) -> str:
    """What a merge did, in a few lines."""
    lines = [f"{found['method']} of {', '.join(found['tasks'])}: rank {found['rank']} -> {found['output']}"]
    if found.get("reused"):
        return lines[0] + " (was there already)"
    if found.get("discarded_energy"):
        lines.append(f"the cut to this rank lost {100 * found['discarded_energy']:.2f} % of the update's energy")
    if found.get("verification_error") is not None:
        lines.append(
            f"verified: read again, random inputs pass within {found['verification_error']:.1e} of the inputs' own merge"
        )
    lines.append(f"{found['seconds_merge']:.2f} s")
    return "\n".join(lines)
