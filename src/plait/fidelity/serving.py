"""What is left of each adapter in every way that a merge can be served: beside its base, baked into it, in four bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from plait.adapters.lora import Adapter
from plait.border.records import nested, optional
from plait.evaluation.evaluate import Logits
from plait.fidelity.language import Own, Sums, log_probabilities, positions, text_batches
from plait.fidelity.measure import Closeness, Fidelity, TaskFidelity, closeness, task_fidelity
from plait.fidelity.panel import Panel, Part, Refused, parts_and_refused
from plait.fidelity.record import FidelityRecord
from plait.fidelity.score import outputs
from plait.fidelity.texts import Texts, checked
from plait.fidelity.tokens import cut_notes, encoded, require_room
from plait.model.attention import fused_attention
from plait.model.base import BaseModel, base_folder
from plait.model.four_bits import is_in_four_bits
from plait.model.held import Held, Weights
from plait.model.stacked import Active, stacked_factors, stacked_updates
from plait.progress import OnProgress


@dataclass(frozen=True, slots=True)
class Way:
    """A way to serve adapters.

    Args:
        name: What tables call it.
        four: Whether it starts from the base in four bits.
        baked: Whether the update is added to the weights, in the type that the base is stored in.
        again: Whether the weights then go through NF4.
    """

    name: str
    four: bool = False
    baked: bool = False
    again: bool = False


BESIDE_FOUR, INTO_FOUR = Way("beside the 4-bit base", four=True), Way("merged into the 4-bit base", True, True, True)
BESIDE, BAKED, AGAIN = (
    Way("beside the full-precision base"),
    Way("baked into it", baked=True),
    Way("baked into it, then NF4", baked=True, again=True),
)


@dataclass(frozen=True, slots=True)
class Served:
    """What one way of serving leaves.

    Args:
        way: What tables call it.
        alone: Of each adapter that is served by itself.
        merged: Of each adapter in the merge; None where there is no merge.
    """

    way: str
    alone: FidelityRecord = nested(FidelityRecord)
    merged: FidelityRecord | None = nested(FidelityRecord, None)


@dataclass(frozen=True, slots=True)
class Measured:
    """What is left of each adapter, way by way.

    Args:
        base: The base.
        four_bits: How the base was held when the adapters were trained: "nf4", "nf4-single", "stored" where its files hold four
            bits; None for full precision.
        tasks: Names of the tasks.
        ways: What each leaves, compared with each adapter alone on the base that it was trained on.
        refused: Heads that are not measured, and why: those of tokens, beside others.
    """

    base: str
    four_bits: str | None
    tasks: tuple[str, ...]
    ways: tuple[Served, ...] = nested(Served, ())
    refused: tuple[Refused, ...] = optional((), kind=Refused)


def ways_of(base: BaseModel) -> tuple[Way, ...]:
    """List the ways that are open to adapters of a base, the one that they were trained in first."""
    if is_in_four_bits(base_folder(base)):
        return BESIDE_FOUR, INTO_FOUR
    return (BESIDE_FOUR, INTO_FOUR, BESIDE, BAKED, AGAIN) if base.four_bits else (BESIDE, BAKED, AGAIN)


def measure(
    adapters: Sequence[Adapter],
    merge: Adapter | None,
    base: BaseModel,
    texts: Mapping[str, Texts],
    *,
    max_length: int = 128,
    batch_size: int = 32,
    on_progress: OnProgress = lambda _: None,
) -> Measured:
    """Compare every way of serving adapters and their merge with each adapter alone, on the base that it was trained on.

    Args:
        adapters: The adapters.
        merge: Their merge; None for the adapters alone.
        base: The base; with `four_bits` where they were trained on it quantised. One whose files hold four bits is what it is,
            and nothing is known of its full precision.
        texts: Task -> its texts, unlabelled.
        max_length: Tokens a text.
        batch_size: Texts a pass.
        on_progress: Called with what is being done.

    Raises:
        InputError: Adapters that do not fit the base, or whose modules cannot be baked; no head whose predictions can be looked at.
        UsageError: Texts of no adapter, or none of some.

    Cost: the linear layers' weights four times in memory; for each way, a pass over the texts for the adapters and one for
        the merge (of text models twice as many), and a quantisation of the weights for each of them where it ends in four bits.
    """
    parts, refused = parts_and_refused(adapters)
    for one in refused:
        on_progress(f"{one.task} is not measured: {one.why}")
    passed_over = {one.task for one in refused}
    known = {t: checked(x, f"texts of {t}") for t, x in texts.items() if t not in passed_over}
    panel = Panel(replace(base, four_bits=None), parts, known, batch_size=batch_size, max_length=max_length)
    adapters = [a for a in adapters if any(p.adapter is a for p in parts)]
    for note in cut_notes(panel):
        on_progress(note)
    require_room(panel)
    named = [replace(a, name=f"{i}") for i, a in enumerate([*adapters, *([merge] if merge else [])])]
    own = {id(a): n for a, n in zip(adapters, named, strict=False)}
    held = Held(panel.model(panel.parts[0]), base_folder(base), named, double=base.four_bits != "nf4-single")
    packed = is_in_four_bits(base_folder(base))
    four = held.in_four_bits(held.full) if base.four_bits and not packed else held.full
    teacher = four if base.four_bits else held.full
    known_of = {p.name: _known(panel, p, held, teacher) for p in panel.parts}

    def left(way: Way, who: Adapter, parts: Sequence[Part]) -> list[TaskFidelity]:
        weights = four if way.four else held.full
        weights = held.baked(weights, who) if way.baked else weights
        weights = held.in_four_bits(weights) if way.again else weights
        return [_left(panel, p, held, known_of[p.name], weights, who, 0.0 if way.baked else 1.0) for p in parts]

    served = []
    for way in ways_of(base):
        on_progress(way.name)
        alone = [t for a in adapters for t in left(way, own[id(a)], [p for p in panel.parts if p.adapter is a])]
        merged = Fidelity.of(left(way, named[-1], panel.parts)) if merge else None
        served.append(
            Served(way.name, FidelityRecord.of(Fidelity.of(alone)), FidelityRecord.of(merged) if merged else None)
        )
    how = "stored" if packed else base.four_bits
    return Measured(base.written, how, tuple(panel.names), tuple(served), refused)


@dataclass(frozen=True, slots=True)
class _Known:
    """What every way is compared with, of one part.

    Args:
        teacher: The weights that the adapter was trained on.
        own: The adapter's own logits on them; None of a text model, whose distributions would not fit in memory.
        bare: Closeness of the bare base.
    """

    teacher: Weights
    own: Logits | None
    bare: Closeness


def _known(panel: Panel, part: Part, held: Held, teacher: Weights) -> _Known:
    if part.is_text:
        return _Known(teacher, None, _between(panel, part, held, teacher, teacher, (None, 1.0))[0])
    with held.giving(teacher):
        own, bare = outputs(panel, part, [(part.adapter, 1.0), (None, 1.0)])
    return _Known(teacher, own, closeness(part.task.kind, own, bare))


def _left(
    panel: Panel, part: Part, held: Held, known: _Known, weights: Weights, who: Adapter, scale: float
) -> TaskFidelity:
    """What an adapter or a merge on some weights leaves of a part on the teacher's; at scale 0 it is in the weights."""
    if known.own is None:
        close, n = _between(panel, part, held, known.teacher, weights, (who if scale else None, 1.0))
        return task_fidelity(part.name, close, known.bare, n)
    with held.giving(weights):
        other = outputs(panel, part, [(who, scale)])[0]
    return task_fidelity(part.name, closeness(part.task.kind, known.own, other), known.bare, len(known.own))


@torch.no_grad()
def _between(
    panel: Panel, part: Part, held: Held, teacher: Weights, weights: Weights, other: Active
) -> tuple[Closeness, int]:
    """Closeness of a text model on some weights to the part's adapter on the teacher's; and the number of positions."""
    model = panel.model(part)
    sides = [(teacher, (part.adapter, 1.0)), (weights, other)]
    updates = [(w, stacked_factors(model, [active], whole=True)) for w, active in sides]
    sums, own_tops, n = Sums(), torch.zeros((), dtype=torch.int64), 0
    for _, batch in text_batches(panel, encoded(panel, part.task.kind, panel.texts[part.name]), 2):
        logits = []
        for side, update in updates:
            with held.giving(side), fused_attention(model), stacked_updates(model, update):
                logits.append(positions(model, part.task.kind, batch, 1, panel.positions)[0][0])
        own = Own.of(log_probabilities(logits[0]))
        n += len(own.top)
        own_tops = own_tops.to(own.top.device) + torch.bincount(own.top, minlength=logits[0].shape[-1])
        sums.add(own, log_probabilities(logits[1]))
    return sums.closeness(own_tops, n), n
