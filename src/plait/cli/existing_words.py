"""What is printed of a choice and of advice: tables, and sentences below them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from plait.border.counts import plural
from plait.cli.output import table

if TYPE_CHECKING:
    from plait.disk.written import Written
    from plait.fidelity.limit import Limit
    from plait.fidelity.measure import TaskFidelity
    from plait.fidelity.record import Advice, AutoRecord, Evidence, FidelityRecord, Repair

SHOWN = 3  # candidates
_BEYOND = "general text moves beyond --max-shift with it"
# What the tables say, below them.
_PICO = "pico: directions of B that the adapters share were shrunk first."
_WORDS = "followed: the probability given to their answers, no more than their own, beyond chance, mean over adapters (docs/merge-auto.md)."
_FIDELITY_WORDS = (
    "agreement: how often the merge predicts what the adapter predicts on its own texts (a correlation for a regression);\n"
    "KL: how far its probabilities are from the adapter's; base's: the same of the bare base; shift: 1 is the base's distance."
)
_CLOSENESS = "\ncloseness: 1 - KL / the bare base's KL, mean over adapters: what is trained is judged by it."
_CHAT_WORDS = (
    "\nAll of it at the tokens of the adapter's own greedy answers, given the same beginning; word for word: the share of answers that\n"
    "the merge would write exactly as the adapter does."
)
_ADVICE_WORDS = (
    "memory: the base's weights + what is held beside them (a merge at the sum of the ranks holds as much as its adapters do\n"
    "side by side); work a token: what the factors add to the base's own; kept: how much of what an adapter predicts\n"
    "otherwise than the base is still predicted, mean over adapters; least kept: of the adapter that loses most."
)


def _heads_text(record: AutoRecord) -> list[str]:
    """Say which heads follow the merge, and what learning them did."""
    lines = []
    if learnt := record.learnt_heads:
        before, after = max(learnt.held_out["merge"], learnt.held_out["fitted"]), learnt.held_out["learnt"]
        how = "" if learnt.kept else f" (not taken{f': {_BEYOND}' if learnt.closer else ''})"
        lines.append(f"heads and weights learnt together: closeness {before:.3f} -> {after:.3f} on held-out texts{how}")
    if followed := [h.task for h in record.heads if h.kept]:
        lines.append(f"heads that follow the merge, closer on held-out texts: {', '.join(followed)}")
    return lines


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
        lines.append(repair_text(repair))
    lines += _heads_text(record)
    lines += [limit_text(record.limit, fidelity.general_kl or 0.0)] if record.limit and fidelity else []
    if record.discarded_energy:
        lines.append(lost_in_cut(f"the cut to rank {record.rank}", record.discarded_energy, record.cut))
    if record.rounding_error is not None:
        lines.append(
            f"in {record.dtype}: rounding took {100 * record.rounding_error:.2g} % of the update (--dtype float32 keeps all)"
        )
    if fidelity:
        words = _FIDELITY_WORDS + (_CHAT_WORDS if record.chat else "")
        lines += ["", fidelity_table(fidelity), "", words + (_CLOSENESS if repair or record.learnt_heads else "")]
    if record.evidence:
        lines += ["", evidence_table(record.evidence)]
        pico = [_PICO] if any(e.calibrate for e in record.evidence[:SHOWN]) else []
        if words := " ".join([*([_WORDS] if fidelity else []), *pico]):
            lines += ["", words]
    if record.notes:
        lines += ["", *(f"- {n}" for n in record.notes)]
    if record.evidence and not fidelity:
        lines += ["", f"Chosen from factors alone{f' ({chosen.why})' if chosen.why else ''}."]
        if not written.output.endswith(".safetensors"):
            lines[-1] += " With the base and --text TASK=FILE for each the choice is measured."
    return "\n".join(lines)


def limit_text(limit: Limit, shift: float) -> str:
    """Say how far a merge moves general text, the limit on that, and what is beyond it."""
    text = f"general text: moved by {shift:.3g} nats, at most {limit.most:g}; beyond that: "
    beyond = []
    if limit.left_out:
        best = limit.left_out[0]
        beyond.append(
            f"{len(limit.left_out)} of {plural(limit.tried, 'merge')}, of which {best.candidate} at scale {best.scale:g} follows its "
            f"adapters best ({best.score:.3f}, {best.general_kl:.3g} nats)"
        )
    return text + ("; ".join([*beyond, *limit.steps]) or f"none of {plural(limit.tried, 'merge')}")


def repair_text(repair: Repair) -> str:
    """Say what distilling the adapters into a merge did."""
    how = f"{repair.method}, on policy" if repair.on_policy else repair.method
    done = f"repaired ({how}), {repair.steps} of at most {plural(max(repair.most, repair.steps), 'step')}"
    if not repair.held_out and not repair.kept:
        return f"not {done}: {_BEYOND}"
    if not repair.held_out:
        return f"{done}: loss {repair.first_loss:.3f} -> {repair.last_loss:.3f}; too few texts to hold any out"
    said = f"closeness {repair.held_out['merge']:.3f} -> {repair.held_out['repaired']:.3f} on held-out texts"
    if "merge, heads: agreement" in repair.held_out:
        for what, of in (("with new heads", "heads"), ("agreement beyond chance", "heads: agreement")):
            said += f", {what} {repair.held_out[f'merge, {of}']:.3f} -> {repair.held_out[f'repaired, {of}']:.3f}"
    if not repair.kept:
        why = f"but {_BEYOND}" if repair.closer else "so the merge stays as it was"
        return f"not {done}: {said}, {why}"
    return f"{done}: {said}"


def _shift(fidelity: TaskFidelity) -> str:
    """The last layer's shift; a dash where the adapter moves nothing, in units of which it would be."""
    if not fidelity.shift:
        return ""
    return f"{fidelity.shift[-1]:.2f}" if fidelity.kl_base else "–"


def fidelity_table(fidelity: FidelityRecord) -> str:
    """Print a line per adapter, the worst first."""
    measured = [kept.fidelity for kept in fidelity.tasks]
    rows = [
        [t.task, f"{t.agreement:.3f}", f"{t.agreement_base:.3f}", f"{t.kl:.4f}", f"{t.kl_base:.4f}",
         _shift(t), str(t.n)]
        for t in measured
    ]  # fmt: skip
    names = ["adapter", "agreement", "base's", "KL", "base's", "last layer's shift", "n"]
    if any(t.verbatim is not None for t in measured):
        names.append("word for word")
        rows = [[*row, f"{100 * (t.verbatim or 0.0):.0f} %"] for row, t in zip(rows, measured, strict=True)]
    text = table(names, rows)
    if fidelity.general_kl is not None:
        text += f"\nKL to the base on general text: {fidelity.general_kl:.4f}"
    return text


def evidence_table(evidence: Sequence[Evidence]) -> str:
    """Print the best candidates, each with the adapter it keeps least of."""
    best = evidence[:SHOWN]
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
