"""The work of a choice, stage by stage, counted before it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from plait.adapters.lora import Adapter
from plait.choosing.auto_settings import AutoSettings
from plait.choosing.candidates import recipes
from plait.choosing.choose import can_learn
from plait.choosing.costs import total_rank
from plait.choosing.duration import Work, tokens_of
from plait.choosing.finishing import repair_steps
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
from plait.learning.head_learning import STEPS
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


def choosing(panel: Panel, settings: AutoSettings, behind: Behind = NOTHING_BEHIND) -> Work:
    """Count what `choose` does.

    Args:
        panel: Base, adapters and all texts.
        settings: What is tried, learnt and fitted, as far as there are texts enough.
        behind: What is done already; moments and merges are made again.
    """
    methods, scales, learns = settings.methods, settings.scales, can_learn(panel)
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
    work += general(panel, left if settings.max_shift is None else asked)
    if settings.refine and learns and WEIGHTS not in behind.stages:
        work += Work(learnt=settings.refine - behind.learnt) + _read(panel, every / HELD_OUT, 2)
    fits = settings.fit and learns and can_fit(panel)
    return work + fitting(panel, settings.max_shift, FIT in behind.stages) if fits else work


def fitting(panel: Panel, max_shift: float | None = None, is_found: bool = False) -> Work:
    """Count two fits on most of the texts, their scales on the rest, and one on all; the last alone where the best is found."""
    fits = len(FITS) * (1 - 1 / HELD_OUT) + 1
    layers = len({m for p in panel.parts for m in p.adapter.modules})
    if is_found:
        return Work(fitted=tokens_of(panel), solved=layers) + general(panel, 1 if max_shift is not None else 0)
    work = Work(fitted=fits * tokens_of(panel), solved=(len(FITS) + 1) * layers)
    work += _read(panel, tokens_of(panel) / HELD_OUT, len(FITS) * len(FIT_SCALES) + 1)
    return work + general(panel, len(FITS) * len(FIT_SCALES) + 1 if max_shift is not None else 0)


def repairing(panel: Panel, steps: int) -> Work:
    """Count a repair of all its steps: answers and layers of most of the texts before it, looks at the rest on the way."""
    if not steps:
        return Work()
    looks = 1 + -(-steps // _EVERY)
    before = Work(reads=4 * (1 - 1 / HELD_OUT) * tokens_of(panel))
    return Work(repaired=steps) + before + _read(panel, tokens_of(panel) / HELD_OUT, looks)


def heads(panel: Panel) -> Work:
    """Count what letting the heads follow reads."""
    return Work() if panel.is_text else Work(reads=tokens_of(panel))


def learning_heads(panel: Panel) -> Work:
    """Count heads learnt with the weights: on most of the texts and on all, from heads fitted there, three merges looked at on the rest."""
    if panel.is_text:
        return Work()
    reads = (2 - 1 / HELD_OUT) + 3 / HELD_OUT
    return Work(learnt=2 * STEPS, reads=reads * tokens_of(panel))


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


def making(panel: Panel, read: Panel, settings: AutoSettings, behind: Behind = NOTHING_BEHIND) -> Work:
    """Count all that `merge auto` does with texts, heads included.

    Args:
        panel: All texts.
        read: Those that the choice reads.
        settings: What is asked for; what is asked of too few texts is not counted.
        behind: What is done already.
    """
    many = can_learn(panel)
    work = measuring(panel)
    if MERGE not in behind.stages:
        work += choosing(read, settings, behind)
    if THE_REPAIR not in behind.stages:
        work += repairing(panel, repair_steps(panel, settings.repair, settings.repair_from) - behind.repaired)
    if LEARNT_HEADS not in behind.stages and settings.learn_heads and many:
        work += learning_heads(panel)
    return work + (heads(panel) if many and THE_HEADS not in behind.stages else Work())


def advising(seen: Panel, judged: Panel, adapters: Sequence[Adapter], settings: AutoSettings, repair: int) -> Work:
    """Count an advice: a choice, its fits at another rank, repairs and heads of each merge, and the look at all of them.

    Args:
        seen: Texts that all is chosen on.
        judged: Texts that it is measured on.
        adapters: What is merged.
        settings: What the choice is asked for.
        repair: Steps of each repair.
    """
    learns = can_learn(seen)
    ranks = 2 if max(a.rank for a in adapters) < total_rank(adapters) else 1
    arms = ranks * (2 if repair else 1)
    work = choosing(seen, settings) + measuring(seen)
    if ranks == 2 and learns and can_fit(seen):
        work += fitting(seen)
    work += repairing(seen, repair) * ranks + (heads(seen) * arms if learns else Work())
    return work + judging(judged, arms + len(adapters))


def judging(panel: Panel, merges: int) -> Work:
    """Count a look at several merges on all texts."""
    return _read(panel, tokens_of(panel), merges) + general(panel, merges)


def _read(panel: Panel, tokens: float, merges: float, *, both: float = 0.0) -> Work:
    """Readings by merges; by the adapters and the base, on `both` tokens of a classifier, or every time where answers are not kept."""
    if panel.is_text:
        return Work(reads=tokens * (merges * 1.1 + 2)) if merges else Work()
    return Work(reads=tokens * merges + 2 * both)


def seen_and_judged(panel: Panel) -> tuple[Panel, Panel]:
    """Split a panel as advice does: what the choice sees, and what it is judged on."""
    most, rest = split_off(panel.texts)
    few = min(map(len, rest.values())) == 0
    return panel.with_texts(most), panel if few else panel.with_texts(rest)
