"""The merge command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli import existing
from plait.cli.existing import Answers, Chat, General, Length, Text, Tokens
from plait.cli.option_checks import only, without
from plait.cli.options import Device, FourBits, Json, Overwrite, Quiet, Seed, Set
from plait.cli.output import emit, number, numbers, settings, table
from plait.errors import UsageError
from plait.merging.listed import require_method

if TYPE_CHECKING:
    from plait.disk.written import Written
    from plait.merging.module_weights import ModuleWeights
    from plait.merging.outcomes import BakeRecord, RankCurve
    from plait.merging.record import MergeRecord

Folders = Annotated[
    list[str],
    typer.Argument(
        help="PEFT folders or LoRA files, PATH or NAME=PATH each; one mergekit YAML file; or auto BASE PATH...: a choice without labels."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Where the result goes.")]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        "-m",
        help="See `plait ls merges`; by default tsv, for 8 language adapters or more iso_c, for language adapters with --stats regmean; "
        "with --weights, and for LoRA files, the sum.",
    ),
]
Strength = Annotated[
    str, typer.Option("--scale", help="Multiplies the merged update; auto chooses by method, number and --stats.")
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", help="One per adapter: 1,1,0.5 (any sign); or a YAML or JSON file of adapter: {pattern: number}."
    ),
]
Stats = Annotated[list[Path] | None, typer.Option("--stats", help="TASK.stats.safetensors or TASK=FILE; repeatable.")]
Format = Annotated[
    str | None, typer.Option("--format", help="peft, kohya, diffusers or mlx; by default as the inputs.")
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="float32, bfloat16 or float16; keep: the inputs' own, where they agree on 16 bits."),
]
Refine = Annotated[int, typer.Option("--refine", min=0, help="auto: steps of learning weights on the texts.")]
FitOption = Annotated[
    bool, typer.Option("--fit/--no-fit", help="auto: fit the merge to the adapters' outputs, layer by layer.")
]
Heads = Annotated[bool, typer.Option("--heads/--no-heads", help="auto: fit the classifiers' last layers to the merge.")]
LearnHeads = Annotated[
    bool, typer.Option("--learn-heads", help="auto: learn copies of classifiers' heads together with the weights.")
]
MaxShift = Annotated[
    float | None, typer.Option("--max-shift", metavar="NATS", help="auto: most KL to the base on --general's texts.")
]
Repair = Annotated[
    str,
    typer.Option(
        "--repair",
        metavar="N|auto",
        help="auto: most steps of distilling the adapters into it; auto: while it helps, given 300 texts of each classifier.",
    ),
]
OnPolicy = Annotated[
    bool, typer.Option("--on-policy", help="auto: to repair, the merge writes after prompts and the adapters judge it.")
]
Base = Annotated[str | None, typer.Option("--base", help="Name of the base, where adapters name it differently.")]

_STATISTICS = (".stats.safetensors", ".fisher.safetensors")
_ONLY_AUTO = (
    "text",
    "general",
    "refine",
    "fit",
    "heads",
    "learn_heads",
    "max_shift",
    "repair",
    "on_policy",
    "answers",
    "chat",
    "tokens",
    "length",
)
# What is done on texts; --repair, --answers and --chat say so themselves.
_OF_TEXTS = (*(n for n in _ONLY_AUTO if n not in ("text", "repair", "answers", "chat")), "four_bits")
_FORWARD = ("featcal", "regmean_pp", "adamerging")
_OF_FORWARD = {
    "quiet", "method", "sets", "weights", "text", "length", "out", "base", "dtype", "four_bits", "overwrite",
}  # fmt: skip
_AUTO = {*_ONLY_AUTO, "four_bits", "quiet", "out", "rank", "base", "dtype", "device", "seed", "overwrite"}


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command()(merge)


def merge(
    context: typer.Context,
    folders: Folders,
    out: Out = None,
    method: Method = None,
    sets: Set = None,
    scale: Strength = "auto",
    weights: Weights = None,
    stats: Stats = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Cut to this rank; the loss is printed.")] = None,
    calibrate: Annotated[str | None, typer.Option("--calibrate", help="pico or svc: shrink what adapters share, before or after.")] = None,
    bake: Annotated[Path | None, typer.Option("--bake", help="Folder of the base: write a full model.")] = None,
    per_task: Annotated[bool, typer.Option("--per-task", help="With --method emr: one adapter and a mask per task.")] = False,
    curve: Annotated[bool, typer.Option("--rank-curve", help="Write nothing; say what smaller ranks would lose.")] = False,
    base: Base = None,
    format: Format = None,
    dtype: Dtype = "keep",
    stack: Annotated[bool, typer.Option("--stack", help="Trained one on top of another: compose in that order.")] = False,
    disjoint: Annotated[bool, typer.Option("--disjoint", help="They share no module, and that is meant.")] = False,
    text: Text = None, general: General = None, refine: Refine = 100, fit: FitOption = True, heads: Heads = True,
    max_shift: MaxShift = None, repair: Repair = "0", on_policy: OnPolicy = False, answers: Answers = None,
    chat: Chat = None, tokens: Tokens = 64,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Read the result again and compare.")] = True,
    length: Length = 128, seed: Seed = 0, device: Device = "cpu", four_bits: FourBits = None, overwrite: Overwrite = False,
    learn_heads: LearnHeads = False, quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Merge LoRA adapters of one base into one adapter. The base itself is needed only to bake.

    Without --method it is what keeps most without texts or statistics: Iso-C for eight plain adapters of language models or more,
    TSV-M for all others and with --rank or --calibrate; for language models with --stats of every adapter RegMean; with --weights the
    weighted sum.
    Without --scale the scale follows from the method and the number of adapters, or from --stats.
    The plain sum: --method task_arithmetic --scale 1.
    `plait merge auto BASE ADAPTER... --out DIR` chooses method, weights and scale without labels, best with --text.
    `plait merge BASE ADAPTER... --method featcal --text TASK=FILE` (or regmean_pp, adamerging) runs the base on the texts.
    """
    if folders[0] == "auto":
        _require_auto(context, texts=bool(text))
        chosen = existing.AutoChoice(
            text, general, refine, fit, heads, max_shift, repair, on_policy, answers, chat, tokens, length, rank, base, dtype, device,
            four_bits, learn_heads, seed, overwrite, quiet,
        )  # fmt: skip
        existing.auto(folders[1:], out, chosen, as_json)
        return
    if method in _FORWARD:
        only(context, f"--method {method}", _OF_FORWARD, hint="it runs the base on the texts, on the CPU")
        forward = existing.ForwardChoice(text, length, base, dtype, four_bits, overwrite, quiet)
        written = existing.by_forward(folders, out, method, settings(sets), numbers(weights, "--weights"), forward)
        emit(written, as_json, merge_text(written))
        return
    if out is None and not curve:
        raise UsageError("where to?", hint="--out DIR")
    _require_meaning(context, folders, per_task=per_task, curve=curve, bake=bake is not None)
    require_method(method)  # before torch is imported
    from plait.merging import MergeRequest, MergeSpec, answer

    strength = None if scale == "auto" else number(scale, "--scale")
    trailing = [Path(f) for f in folders if f.endswith(_STATISTICS)]  # --stats pool/* leaves them here
    listed, by_module = _weights(weights)
    spec = MergeSpec(
        method, settings(sets), weights=listed, module_weights=by_module, scale=strength, rank=rank, calibrate=calibrate,
        seed=seed, device=device, base=base, disjoint=disjoint,
    )  # fmt: skip
    request = MergeRequest(
        [f for f in folders if not f.endswith(_STATISTICS)], out, spec, statistics=named_files([*(stats or []), *trailing]),
        format=format, dtype=dtype, verify=verify, overwrite=overwrite, bake_into=bake, per_task=per_task, curve=curve, stack=stack,
    )  # fmt: skip
    result = answer(request)
    emit(result, as_json, merge_text(result))


def _require_auto(context: typer.Context, *, texts: bool) -> None:
    """Refuse options that `merge auto` would pass over."""
    only(context, "merge auto", _AUTO, hint="it chooses method, weights and scale by itself")
    if not texts:
        without(context, "merge auto without --text", _OF_TEXTS, hint="--text TASK=FILE for every adapter")


def _require_meaning(context: typer.Context, folders: list[str], *, per_task: bool, curve: bool, bake: bool) -> None:
    """Refuse options that the way of merging that is asked for would pass over."""
    without(context, "a merge by --method", (*_ONLY_AUTO, "four_bits"), hint="plait merge auto BASE ADAPTER...")
    if len(folders) == 1 and folders[0].endswith((".yaml", ".yml")):
        without(
            context, "a mergekit recipe", ("method", "sets", "weights", "scale", "base"), hint="it says them itself"
        )
    if curve:
        without(
            context,
            "--rank-curve",
            ("out", "overwrite", "verify", "format", "dtype", "stack"),
            hint="it writes nothing",
        )
    if per_task:
        without(context, "--per-task", ("verify", "device", "stack"))
    if bake:
        without(context, "--bake", ("format", "dtype"), hint="it writes a full model, in the base's types")


def _weights(given: str | None) -> tuple[list[float] | None, ModuleWeights | None]:
    """One weight per adapter, or those of a file by module pattern."""
    if given is None or not given.endswith((".yaml", ".yml", ".json")):
        return numbers(given, "--weights"), None
    from plait.merging.module_weights import read_module_weights

    return None, read_module_weights(Path(given))


def named_files(files: list[Path] | None) -> dict[str, Path] | None:
    """``TASK=FILE``, or files whose name before the first dot is the task."""
    if not files:
        return None
    pairs = [str(f).partition("=") for f in files]
    return {name if eq else Path(name).name.split(".")[0]: Path(path if eq else name) for name, eq, path in pairs}


def merge_text(result: Written[MergeRecord] | Written[BakeRecord] | RankCurve) -> str:
    """Say in a few lines what a merge did."""
    from plait.merging.outcomes import RankCurve
    from plait.merging.words import words_of

    if isinstance(result, RankCurve):
        rows = [
            [str(r.rank), f"{100 * r.discarded_energy:.2f} %", f"{r.verification_error:.1e}", f"{r.size_mb:.1f}"]
            for r in result.curve
        ]
        text = table(["rank", "energy lost", "verified to", "MB"], rows, text_columns=0)
        return text + (f"\ncut {result.curve[0].cut}" if result.curve[0].cut else "")
    return words_of(result)
