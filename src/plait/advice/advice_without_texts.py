"""Advice where nothing was measured: what nobody can know, what factors alone suggest, the command that would measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plait.adapters.lineage import base_adapter
from plait.adapters.lora import Adapter
from plait.choosing import notes
from plait.choosing.auto import AutoMerge
from plait.choosing.proxy import mean_error, terms
from plait.errors import InputError, PlaitError
from plait.fidelity.panel import parts_of
from plait.formats.recognised import of_images
from plait.merging.stack import in_order
from plait.model.base import BaseModel


def no_size(base: str) -> str:
    """Say that the base's size is not known, and why."""
    where = f"{base} is not at hand as a folder" if base else "the adapters do not name it"
    return f"the base's size ({where}): memory is given beside it"


def unknown(adapters: Sequence[Adapter], base: BaseModel | None, texts: bool) -> list[str]:
    """Say what is not known, with the reason."""
    if of_images(adapters):
        return ["what a merge keeps of each adapter: for that pictures have to be made and looked at, with equal seeds"]
    unknowns = ["what a merge keeps of each adapter: nobody can say without a few of its inputs"]
    if texts and base is None:
        unknowns.append("the texts were not used: they are read by the base model, and none was given")
    if any(not a.heads and a.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM") for a in adapters):
        unknowns.append("what the adapters predict: one has neither a head nor a text task type")
    return unknowns


def without_texts(adapters: Sequence[Adapter], merged: AutoMerge, base: BaseModel | None) -> str:
    """Say how far a merge is from the adapters on assumed inputs, and the next step."""
    errors = terms(merged.adapter, adapters)
    error = mean_error(errors, 1.0)
    stand_in = _stand_in(adapters) if merged.akin else ""
    worst = max(errors, key=lambda t: errors[t].error(1.0))
    distance = (
        f"serve separately until it is measured. On inputs assumed from the factors alone the best merge is off by "
        f"{100 * error**0.5:.0f} % of an adapter's own update (most for {worst}){stand_in}; what that does to "
    )
    if of_images(adapters):
        return f"{distance}pictures is not known. plait merge auto writes that merge: try it with seeds you know."
    try:
        parts_of(adapters)
    except PlaitError as refused:  # as the command that measures would be
        return f"{distance}predictions is not known, and cannot be measured here: {refused}"
    return (
        f"{distance}predictions is not known. With the base and 20 to 100 unlabelled inputs of each it can be measured:\n"
        f"  {notes.next_step(adapters, base)}"
    )


def _stand_in(adapters: Sequence[Adapter]) -> str:
    """Say which one of adapters that point the same way could stand for all."""
    errors = {a.name: mean_error({t: e for t, e in terms(a, adapters).items() if t != a.name}, 1.0) for a in adapters}
    best = min(errors, key=lambda n: errors[n])
    return f", {best} alone by {100 * errors[best] ** 0.5:.0f} % of the others'"


def stacked(adapters: Sequence[Adapter]) -> str | None:
    """Say what to do with adapters that were trained one on top of another; None for others."""
    if not any(base_adapter(Path(str(a.source.get("path", "")))) for a in adapters):
        return None
    try:
        ordered = in_order(adapters)
    except InputError:
        return None
    names = " on ".join(a.name for a in reversed(ordered))
    folders = " ".join(notes.place(a) for a in ordered)
    return (
        f"compose them: {names} was trained as a stack, and apart the upper ones do not do what they learnt. Exact:\n"
        f"  plait merge --stack {folders} --out DIR"
    )
