"""The work of a choice, stage by stage, counted before it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from plait.adapters.lora import Adapter
from plait.choosing.candidates import METHODS, SCALES, recipes
from plait.choosing.choose import can_learn
from plait.choosing.costs import total_rank
from plait.choosing.duration import Work, tokens_of
from plait.choosing.tournament import number_going, read_in, rounds_of
from plait.fidelity.panel import Panel
from plait.fidelity.texts import HELD_OUT, split_off
from plait.fidelity.tokens import encoded
from plait.learning.checkpoint_reach import (
    FINISHING,
    FIT,
    LEARNT_HEADS,
    MERGE,
    REPAIR,
    SCORES,
    THE_HEADS,
    THE_REPAIR,
    WEIGHING,
    WEIGHTS,
)
from plait.learning.checkpoints import Checkpoints
from plait.learning.fitting import SCALES as FIT_SCALES
from plait.learning.fitting import TRIED as FITS
from plait.learning.fitting import can_fit
from plait.merging.registry import find_method

# Scales that a merge is tried at, on average, where there are more than three.
SCALES_TRIED = 3.8
# Steps of a repair between looks at the texts held out (`plait.learning.distil.Stopping`).
_EVERY = 20


@dataclass(frozen=True, slots=True)
class Behind:
    """What of a choice is done already.

    Args:
        scored: Texts that a round reads -> merges at scales that were scored on them.
        stages: Names of what is done: pieces of a checkpoint, and what was done to the choice afterwards.
        learnt: Steps in which weights were learnt.
        repaired: Steps of a repair that were taken.
    """

    scored: Mapping[int, int] = field(default_factory=dict)
    stages: tuple[str, ...] = ()
    learnt: int = 0
    repaired: int = 0

    @classmethod
    def of(cls, checkpoints: Checkpoints) -> Behind:
        """Say what is kept."""
        names = (SCORES, WEIGHING, WEIGHTS, FIT, MERGE, REPAIR, FINISHING)
        pieces = {name: p.values for name in names if (p := checkpoints.piece(name))}
        scored: dict[int, int] = {}
        for call in pieces.get(SCORES, {}).get(
            "calls", ()
        ):  # one that is not answered by all adapters is counted whole
            scored[call["texts"]] = scored.get(call["texts"], 0) + len(call["asked"])
        after = pieces.get(FINISHING, {}).get("after", ())
        learnt, repaired = (pieces.get(name, {}).get("step", 0) for name in (WEIGHING, REPAIR))
        return cls(scored, (*pieces, *after), learnt, repaired)

    def left(self, texts: int, going: float) -> float:
        """Count those of a round's merges at scales that are still to be scored."""
        begun = max(self.scored, default=0)
        return 0.0 if texts < begun else max(0.0, going - self.scored.get(texts, 0))


NOTHING_BEHIND = Behind()


def choosing(
    panel: Panel,
    methods: tuple[str, ...],
    scales: tuple[float, ...],
    *,
    held_out: int,
    refine: int = 0,
    fit: bool = False,
    max_shift: float | None = None,
    behind: Behind = NOTHING_BEHIND,
) -> Work:
    """Count what `choose` does.

    Args:
        panel: Base, adapters and all texts.
        methods: Methods that are tried.
        scales: Scales, before any merge goes beyond them.
        held_out: Every such text is held out.
        refine: Steps in which weights are learnt; 0 where none are.
        fit: Whether the winner is fitted.
        max_shift: Limit on what general text is moved by.
        behind: What is done already; moments and merges are made again.
    """
    merges = len(list(recipes(("base", "own") if any(find_method(m).needs for m in methods) else (), methods)))
    every, tried = tokens_of(panel), merges * min(SCALES_TRIED, len(scales))
    rounds = rounds_of(panel)
    answered = tokens_of(read_in(panel, max(behind.scored))) if behind.scored else 0
    work = Work(merges=merges, moments=2 * every) + _read(panel, 0, 0, both=every - answered)
    known, going, asked = 0, tried, 0.0
    for i, (texts, _) in enumerate(rounds):
        if i:
            going = min(going, number_going(merges, len(scales), rounds[i - 1][1]))
        tokens, left = tokens_of(read_in(panel, texts)), behind.left(texts, going)
        work += _read(panel, tokens if panel.is_text else tokens - known, left)
        known, asked = tokens, asked + left
    work += general(panel, left if max_shift is None else asked)
    if refine and WEIGHTS not in behind.stages:
        work += Work(learnt=refine - behind.learnt) + _read(panel, every / held_out, 2)
    return work + fitting(panel, held_out, max_shift, FIT in behind.stages) if fit and can_fit(panel) else work


def fitting(panel: Panel, held_out: int, max_shift: float | None = None, is_found: bool = False) -> Work:
    """Count two fits on most of the texts, their scales on the rest, and one on all; the last alone where the best is found."""
    fits = len(FITS) * (1 - 1 / held_out) + 1
    layers = len({m for p in panel.parts for m in p.adapter.modules})
    if is_found:
        return Work(fitted=tokens_of(panel), solved=layers) + general(panel, 1 if max_shift is not None else 0)
    work = Work(fitted=fits * tokens_of(panel), solved=(len(FITS) + 1) * layers)
    work += _read(panel, tokens_of(panel) / held_out, len(FITS) * len(FIT_SCALES) + 1)
    return work + general(panel, len(FITS) * len(FIT_SCALES) + 1 if max_shift is not None else 0)


def repairing(panel: Panel, steps: int, held_out: int) -> Work:
    """Count a repair of all its steps: answers and layers of most of the texts before it, looks at the rest on the way."""
    if not steps:
        return Work()
    looks = 1 + -(-steps // _EVERY)
    before = Work(reads=4 * (1 - 1 / held_out) * tokens_of(panel))
    return Work(repaired=steps) + before + _read(panel, tokens_of(panel) / held_out, looks)


def heads(panel: Panel) -> Work:
    """Count what letting the heads follow reads."""
    return Work() if panel.is_text else Work(reads=tokens_of(panel))


def learning_heads(panel: Panel, steps: int) -> Work:
    """Count heads learnt with the weights: on most of the texts and on all, from heads fitted there, three merges looked at on the rest."""
    if panel.is_text or not steps:
        return Work()
    reads = (2 - 1 / HELD_OUT) + 3 / HELD_OUT
    return Work(learnt=2 * steps, reads=reads * tokens_of(panel))


def measuring(panel: Panel) -> Work:
    """Count what the last look at a merge reads: its answers, and three times the hidden states."""
    return _read(panel, tokens_of(panel), 1) + Work(reads=3 * tokens_of(panel)) + general(panel, 1)


def general(panel: Panel, merges: float) -> Work:
    """Count the readings of general texts by merges and the base, for every head."""
    if not panel.general or not merges:
        return Work()
    if panel.is_text:  # read as they are by all of them, where own texts may be prompts that are answered
        tokens = sum(len(row["input_ids"]) for row in encoded(panel, panel.parts[0].task.kind, panel.general))
    else:
        tokens = tokens_of(panel.with_texts(dict.fromkeys(panel.texts, panel.general), general=False))
    return Work(reads=(merges + 1) * tokens)


def making(
    panel: Panel,
    read: Panel,
    methods: tuple[str, ...],
    scales: tuple[float, ...],
    *,
    refine: int,
    fit: bool,
    repair: int,
    head_steps: int = 0,
    max_shift: float | None = None,
    behind: Behind = NOTHING_BEHIND,
) -> Work:
    """Count all that `merge auto` does with texts, heads included.

    Args:
        panel: All texts.
        read: Those that the choice reads.
        methods: Methods that are tried.
        scales: Scales.
        refine: Steps in which weights are learnt.
        fit: Whether the winner is fitted.
        repair: Steps of the repair.
        head_steps: Steps in which heads and weights are learnt together, each of two times.
        max_shift: Limit on what general text is moved by.
        behind: What is done already.
    """
    learns, many = can_learn(read), can_learn(panel)
    work = measuring(panel)
    if MERGE not in behind.stages:
        work += choosing(
            read,
            methods,
            scales,
            held_out=HELD_OUT,
            refine=refine * learns,
            fit=fit and learns,
            max_shift=max_shift,
            behind=behind,
        )
    if THE_REPAIR not in behind.stages:
        work += repairing(panel, repair - behind.repaired, HELD_OUT)
    if LEARNT_HEADS not in behind.stages:
        work += learning_heads(panel, head_steps * many)
    return work + (heads(panel) if many and THE_HEADS not in behind.stages else Work())


def advising(
    seen: Panel,
    judged: Panel,
    adapters: Sequence[Adapter],
    *,
    refine: int,
    repair: int,
    held_out: int,
    learns: bool,
) -> Work:
    """Count an advice: a choice, its fits at another rank, repairs and heads of each merge, and the look at all of them.

    Args:
        seen: Texts that all is chosen on.
        judged: Texts that it is measured on.
        adapters: What is merged.
        refine: Steps in which weights are learnt.
        repair: Steps of each repair.
        held_out: Every such text of `seen` is held out.
        learns: Whether there are texts enough for that.
    """
    ranks = 2 if max(a.rank for a in adapters) < total_rank(adapters) else 1
    arms = ranks * (2 if repair else 1)
    work = choosing(seen, METHODS, SCALES, held_out=held_out, refine=refine * learns, fit=learns) + measuring(seen)
    if ranks == 2 and learns and can_fit(seen):
        work += fitting(seen, held_out)
    work += repairing(seen, repair, held_out) * ranks + (heads(seen) * arms if learns else Work())
    return work + judging(judged, arms + len(adapters))


def judging(panel: Panel, merges: int) -> Work:
    """Count a look at several merges on all texts."""
    return _read(panel, tokens_of(panel), merges) + general(panel, merges)


def _read(panel: Panel, tokens: float, merges: float, *, both: float = 0.0) -> Work:
    """Readings by merges; by the adapters and the base, on `both` tokens of a classifier, or every time where answers are not kept."""
    if panel.is_text:
        return Work(reads=tokens * (merges * 1.1 + 2)) if merges else Work()
    return Work(reads=tokens * merges + 2 * both)


def seen_and_judged(panel: Panel, held_out: int) -> tuple[Panel, Panel]:
    """Split a panel as advice does: what the choice sees, and what it is judged on."""
    most, rest = split_off(panel.texts, held_out)
    few = min(map(len, rest.values())) == 0
    return panel.with_texts(most), panel if few else panel.with_texts(rest)
