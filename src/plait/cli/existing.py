"""What adapters that already exist want: `merge auto` (dispatched from merge) and `advise`."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from plait.cli.options import Device, FourBits, Json, Quiet, Seed
from plait.cli.output import emit, table
from plait.errors import printable

if TYPE_CHECKING:
    from plait.disk.written import Written
    from plait.fidelity.record import Advice, AutoRecord, Evidence, FidelityRecord
    from plait.merging.record import MergeRecord

Given = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER",
        help="PEFT folders, DIR or NAME=DIR each; before them, if at hand, the base: a folder or a hub name.",
    ),
]
Text = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="TASK=FILE", help="Up to 100 unlabelled texts of an adapter: .txt, or a table's FILE:COLUMN[,COLUMN]."),
]  # fmt: skip
General = Annotated[
    str | None, typer.Option("--general", metavar="FILE", help="Texts of no task, for the KL to the base.")
]
Length = Annotated[int, typer.Option("--max-length", min=8, help="Tokens of a text that are read.")]


# What the tables say, below them.
_PICO = "pico: directions of B that the adapters share were shrunk first."
_WORDS = f"followed: agreement and probability, beyond chance, mean over adapters (docs/existing.md). {_PICO}"
_FIDELITY_WORDS = (
    "agreement: how often the merge predicts what the adapter predicts on its own texts (a correlation for a regression);\n"
    "KL: how far its probabilities are from the adapter's; base's: the same of the bare base; shift: 1 is the base's distance."
)
_ADVICE_WORDS = (
    "memory: the base's weights + what is held beside them (a merge at the sum of the ranks holds as much as its adapters do\n"
    "side by side); work a token: what the factors add to the base's own; kept: how much of what an adapter predicts\n"
    "otherwise than the base is still predicted, mean over adapters; least kept: of the adapter that loses most."
)


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command()(advise)


def advise(
    given: Given,
    text: Text = None,
    general: General = None,
    tolerate: Annotated[float, typer.Option("--tolerate", min=0, max=1, help="Share of an adapter that may be lost.")] = 0.1,
    repair: Annotated[int, typer.Option("--repair", min=0, help="Steps of the repair that is tried; 0 for none.")] = 100,
    refine: Annotated[int, typer.Option("--refine", min=0, help="Steps of learning the merge's weights.")] = 100,
    base_id: Annotated[str | None, typer.Option("--base", help="Name of the base, where adapters name it differently.")] = None,
    length: Length = 128, device: Device = "auto", four_bits: FourBits = None, seed: Seed = 0, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Say whether to merge at all, and how.

    Serving separately, merging, the best single adapter and a repair, side by side; measured where the base and --text are
    given.
    """
    from plait.fidelity.advise import AdviceSettings, advise_folders
    from plait.fidelity.texts import parse_texts, read_place

    settings = AdviceSettings(tolerate, repair, refine, length, seed)
    advice = advise_folders(
        given, parse_texts(text or []), read_place(general) if general else (), settings, base_id=base_id, device=device,
        four_bits=four_bits, on_progress=_reporter(quiet),
    )  # fmt: skip
    if advice.next:
        texts = [f"--text {shlex.quote(t)}" for t in text or []] + ([f"--base-4bit {four_bits}"] if four_bits else [])
        advice = replace(advice, next=" ".join([advice.next, *texts]))
    emit(advice, as_json, advice_text(advice))


class AutoChoice(NamedTuple):
    """The options of `merge` that `auto` takes."""

    text: list[str] | None
    general: str | None
    refine: int
    fit: bool
    heads: bool
    max_shift: float | None
    repair: int
    length: int
    rank: int | None
    base_id: str | None
    dtype: str
    device: str
    four_bits: str | None
    seed: int
    overwrite: bool
    quiet: bool = False


def auto(given: list[str], out: Path | None, chosen: AutoChoice, as_json: bool) -> None:
    """What `plait merge auto BASE ADAPTER...` does."""
    from plait.errors import UsageError
    from plait.fidelity.auto import AutoSettings
    from plait.fidelity.auto_folders import merge_auto_folders
    from plait.fidelity.given import split_base
    from plait.fidelity.texts import parse_texts, read_place

    if out is None:
        raise UsageError("where to?", hint="--out DIR")
    base, folders = split_base(given, chosen.device, four_bits=chosen.four_bits)
    settings = AutoSettings(
        refine=chosen.refine,
        fit=chosen.fit,
        heads=chosen.heads,
        max_shift=chosen.max_shift,
        repair=chosen.repair,
        rank=chosen.rank,
        max_length=chosen.length,
        seed=chosen.seed,
    )
    written = merge_auto_folders(
        folders, out, base=base, texts=parse_texts(chosen.text or []),
        general=read_place(chosen.general) if chosen.general else (), settings=settings, base_id=chosen.base_id,
        dtype=chosen.dtype, device=chosen.device, four_bits=chosen.four_bits, overwrite=chosen.overwrite,
        on_progress=_reporter(chosen.quiet),
    )  # fmt: skip
    emit(written, as_json, auto_text(written))


class ForwardChoice(NamedTuple):
    """The options of `merge` that methods with forward passes take beside their own."""

    text: list[str] | None
    length: int
    base_id: str | None
    dtype: str
    four_bits: str | None
    overwrite: bool


def by_forward(
    given: list[str], out: Path | None, method: str, options: dict[str, Any], weights: list[float] | None, chosen: ForwardChoice
) -> Written[MergeRecord]:  # fmt: skip
    """What `plait merge BASE ADAPTER... --method regmean_pp` does."""
    from plait.errors import UsageError
    from plait.fidelity.forward import merge_by_forward
    from plait.fidelity.given import split_base
    from plait.fidelity.texts import parse_texts

    if out is None:
        raise UsageError("where to?", hint="--out DIR")
    base, folders = split_base(given, "cpu", four_bits=chosen.four_bits)
    return merge_by_forward(
        folders, out, method, base=base, texts=parse_texts(chosen.text or []), options=options, weights=weights,
        base_id=chosen.base_id, max_length=chosen.length, dtype=chosen.dtype, four_bits=chosen.four_bits,
        overwrite=chosen.overwrite,
    )  # fmt: skip


def _reporter(quiet: bool) -> Callable[[str], None]:
    """Says on stderr what is being done, and how many seconds after the start."""
    started = time.monotonic()
    if quiet:
        return lambda what: None

    def report(what: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed stderr must not end a choice
            sys.stderr.write(f"[{time.monotonic() - started:.0f} s] {printable(what)}\n")

    return report


def auto_text(written: Written[AutoRecord]) -> str:
    """Print what was chosen, how close it is to every adapter, and the best of what else was tried."""
    from plait.merging.words import lost_in_cut  # it imports NumPy, which help and typing errors do without

    record = written.record
    chosen, repair, fidelity = record.chosen, record.repair, record.fidelity
    lines = [f"{chosen.candidate} at scale {chosen.scale:g} of {', '.join(record.tasks)} -> {written.output}"]
    if written.reused:
        lines[0] += " (was there already)"
    if chosen.fit and record.held_out:
        before = record.held_out.get("cut", max(v for k, v in record.held_out.items() if k != "fitted"))
        lines.append(
            f"fitted front to back to the adapters' outputs: {before:.3f} -> {record.held_out['fitted']:.3f} on held-out texts"
        )
    if chosen.weights and record.held_out:
        before, after = record.held_out["chosen"], record.held_out["refined"]
        lines.append(f"weights per adapter and module learnt: {before:.3f} -> {after:.3f} on held-out texts")
    if repair:
        lines.append(f"repaired in {repair.steps} steps: loss {repair.first_loss:.3f} -> {repair.last_loss:.3f}")
    if followed := [h.task for h in record.heads if h.kept]:
        lines.append(f"heads that follow the merge, closer on held-out texts: {', '.join(followed)}")
    if record.discarded_energy:
        lines.append(lost_in_cut(f"the cut to rank {record.rank}", record.discarded_energy, record.cut))
    if record.rounding_error is not None:
        lines.append(
            f"in {record.dtype}: rounding took {100 * record.rounding_error:.2g} % of the update (--dtype float32 keeps all)"
        )
    if fidelity:
        lines += ["", fidelity_table(fidelity), "", _FIDELITY_WORDS]
    if record.evidence:
        lines += ["", evidence_table(record.evidence), "", _WORDS if fidelity else _PICO]
    if record.notes:
        lines += ["", *(f"- {n}" for n in record.notes)]
    if record.evidence and not fidelity:
        lines += ["", f"Chosen from factors alone{f' ({chosen.why})' if chosen.why else ''}."]
        if not written.output.endswith(".safetensors"):
            lines[-1] += " With the base and --text TASK=FILE for each the choice is measured."
    return "\n".join(lines)


def fidelity_table(fidelity: FidelityRecord) -> str:
    """Print a line per adapter, the worst first."""
    rows = [
        [t.task, f"{t.agreement:.3f}", f"{t.agreement_base:.3f}", f"{t.kl:.4f}", f"{t.kl_base:.4f}",
         f"{t.shift[-1]:.2f}" if t.shift else "", str(t.n)]
        for t in (kept.fidelity for kept in fidelity.tasks)
    ]  # fmt: skip
    text = table(["adapter", "agreement", "base's", "KL", "base's", "last layer's shift", "n"], rows)
    if fidelity.general_kl is not None:
        text += f"\nKL to the base on general text: {fidelity.general_kl:.4f}"
    return text


def evidence_table(evidence: Sequence[Evidence], most: int = 3) -> str:
    """Print the best candidates, each with the adapter it keeps least of."""
    best = evidence[:most]
    if evidence[0].score is None:
        rows = [[e.candidate, f"{e.scale:g}", f"{e.assumed_error:.3f}", e.tasks[0].task] for e in best]
        return table(["candidate", "scale", "error on assumed inputs", "worst"], rows)
    rows = []
    for e in best:
        worst = e.tasks[0].fidelity
        shown = [f"{e.score:.3f}", worst.task, f"{worst.agreement:.3f}", str(e.texts)]
        rows.append([e.candidate, f"{e.scale:g}", *shown])
    return table(["candidate", "scale", "followed", "worst", "agreement there", "texts"], rows)


def advice_text(advice: Advice) -> str:
    """Print the options side by side, what is unknown, and the recommendation."""
    rows = [
        [o.option, o.memory, o.added_flops, _share(o.kept), _share(o.worst), o.worst_task or ""] for o in advice.options
    ]
    lines = [table(["option", "memory", "work a token", "kept", "least kept", "of adapter"], rows)]
    if len(rows) > 1:
        lines += ["", _ADVICE_WORDS]
    lines += ["", *(f"- {n}" for n in advice.notes)]
    if advice.unknown:
        lines += ["", "Not known:", *(f"- {u}" for u in advice.unknown)]
    lines += ["", f"Advice: {advice.advice}"]
    if advice.next:
        lines.append(f"  {advice.next}")
        if advice.then:
            lines.append(f"  {advice.then}")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.0f} %"
