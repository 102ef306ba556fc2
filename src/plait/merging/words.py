"""A merge in a few lines, as a command tells it."""

from __future__ import annotations

import shlex
from pathlib import Path

from plait.disk.written import Written
from plait.formats.alpha import alpha_notes
from plait.merging.outcomes import BakeRecord
from plait.merging.record import IN_THE_METRIC, MergeRecord


def words_of(result: Written[MergeRecord] | Written[BakeRecord]) -> str:
    """Say what a merge did, how far it was verified, and what may be done with it."""
    record = result.record
    lines = [f"{_how(record)} of {', '.join(record.tasks or ())} -> {result.output}"]
    if result.reused:
        return lines[0] + " (was there already)"
    lines += _notes(record) if isinstance(record, MergeRecord) else []
    if isinstance(record, BakeRecord):
        lines += [f"scale {record.scale:g}: {record.scale_reason}"] if record.scale_reason else []
        lines.append(f"rounding to {', '.join(record.dtype)} took {100 * record.rounding_error:.3g} % of the update")
    lines += record.beside
    if record.verification_error is not None:
        lines.append(
            f"verified: read again and compared on random inputs, largest error {record.verification_error:.1e}"
        )
    if heads := sorted(p.stem for p in (Path(result.output) / "heads").glob("*.safetensors")):
        lines.append(
            f"heads of {', '.join(heads)}: " + _heads_use(result.output, heads[0], whole=isinstance(record, BakeRecord))
        )
    if result.seconds_merge is not None:
        lines.append(f"{result.seconds_merge:.2f} s")
    return "\n".join(lines)


def _heads_use(output: str, head: str, *, whole: bool) -> str:
    """Say how the heads beside a merge, or beside a whole model, are used."""
    if whole:
        return f"the lines in {Path(output) / 'README.md'} put one into the model"
    return (
        f"plait.load_head puts one in; plait export {shlex.quote(output)} --for peft --task {head} --out DIR makes an ordinary "
        "classifier's folder"
    )


def lost_in_cut(cut: str, energy: float, how: str | None) -> str:
    """Say what a cut lost, of the update or of what it puts out, and how it was made where statistics were given."""
    of = "what the update puts out" if how == IN_THE_METRIC else "the update's energy"
    return f"{cut} lost {100 * energy:.2f} % of {of}" + (f" (cut {how})" if how else "")


def rounding_line(dtype: str | None, error: float) -> str:
    """Say in which type factors were written, and what that took."""
    if not error:
        return f"in {dtype}, as the inputs: exact"
    return f"in {dtype}: rounding took {100 * error:.2g} % of the update; --dtype float32 takes twice the space and nothing"


def _notes(record: MergeRecord) -> list[str]:
    """Say where alphas and the scale come from, and what ranks and masks cost."""
    lines = [f"{adapter.name}: {note}" for adapter in record.adapters for note in alpha_notes(adapter.facts)]
    if record.method_reason:
        lines.append(f"{record.method}: {record.method_reason}")
    if record.scale_reason:
        lines.append(f"scale {record.scale:g}: {record.scale_reason}")
    if record.rank:
        lines.append(f"rank {record.rank}")
    if record.loss.discarded_energy:
        lines.append(lost_in_cut("the cut to this rank", record.loss.discarded_energy, record.cut))
    if record.rounding_error is not None:
        lines.append(rounding_line(record.dtype, record.rounding_error))
    if record.relative_error:
        far = ", ".join(f"{t} {100 * e:.1f} %" for t, e in record.relative_error.items())
        lines.append(f"each task with its mask is off by: {far}")
    return [*lines, *record.notes]


def _how(record: MergeRecord | BakeRecord) -> str:
    """Name the method, its scale, and weights where they are not 1 each."""
    listed = [f"{w:g}" for w in record.weights or () if any(w != 1 for w in record.weights or ())]
    by_module = isinstance(record, MergeRecord) and record.module_weights
    said = {"task_arithmetic": f" (the {'weighted' if listed or by_module else 'plain'} sum)"}.get(
        record.method or "", ""
    )
    said += " with weights by module" if by_module else ""
    return f"{record.method}{said} at scale {record.scale:g}" + (f", weights {', '.join(listed)}," if listed else "")
