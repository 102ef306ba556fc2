"""The command that says what is left of each adapter, however a merge is served."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.existing import Length, Text
from plait.cli.options import Device, FourBits, Json, Quiet
from plait.cli.output import emit, table
from plait.cli.trying import Base, Moved
from plait.errors import InputError, UsageError
from plait.progress import note

if TYPE_CHECKING:
    from plait.fidelity.record import FidelityRecord
    from plait.fidelity.serving import Measured

_WORDS = (
    "Each is compared with the adapter alone, on the base that it was trained on. followed: the probability given to its answers,\n"
    "no more than its own, beyond chance, mean over adapters; agreement: how often the likeliest answer is the same (a correlation\n"
    "for a regression)."
)


def register(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(measure)


def measure(
    merged: Annotated[str, typer.Argument(help="The merge, or one adapter: its folder, or its name on the hub.")],
    text: Text = None, base: Base = None, adapter: Moved = None, four_bits: FourBits = None, length: Length = 128,
    device: Device = "auto", quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Measure what serving a merge leaves of each adapter.

    Beside its base, baked into it, and baked and quantised to NF4; with --base-4bit for adapters of QLoRA also beside the base in
    four bits and merged into it. The adapters are those of the merge's own record, where they still are.
    """
    from plait.fidelity.serving import measure as measured
    from plait.fidelity.texts import parse_texts
    from plait.trying.inputs import trial_of

    texts = parse_texts(text or [])
    if not texts:
        raise UsageError("measured on which texts?", hint="--text TASK=FILE for every adapter")
    trial = trial_of(merged, base, adapter or [], device)
    if trial.missing:
        raise InputError(f"{trial.missing[0].name}: {trial.missing[0].why}", where=merged)
    adapters, merge = (trial.adapters, trial.merge) if trial.adapters else ((trial.merge,), None)
    found = measured(
        adapters, merge, replace(trial.base, four_bits=four_bits), texts, max_length=length,
        on_progress=(lambda what: None) if quiet else note,
    )  # fmt: skip
    emit(found, as_json, measured_text(found))


def measured_text(measured: Measured) -> str:
    """Print a line for each way of serving."""
    merged = any(s.merged for s in measured.ways)
    names = ["followed", "worst", "agreement there"]
    header = ["served", *([f"merge {names[0]}", *names[1:]] if merged else []), f"alone {names[0]}", *names[1:]]
    rows = [[s.way, *(_cells(s.merged) if s.merged else []), *_cells(s.alone)] for s in measured.ways]
    refused = [f"- {one.task} is not measured: {one.why}" for one in measured.refused]
    return "\n\n".join([table(header, rows), _WORDS, *(["\n".join(refused)] if refused else [])])


def _cells(record: FidelityRecord) -> list[str]:
    worst = min((t.fidelity for t in record.tasks), key=lambda t: t.followed)
    return [f"{record.score:.3f}", worst.task, f"{worst.agreement:.3f}"]
