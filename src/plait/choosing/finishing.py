"""A chosen merge is finished: repaired, its heads made to follow, all within a limit on general text, and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.border.records import from_json, to_json
from plait.choosing.auto_settings import AutoSettings
from plait.choosing.choose import within
from plait.choosing.notes import too_few_to_repair
from plait.errors import RunError
from plait.fidelity.measure import Fidelity
from plait.fidelity.panel import Panel
from plait.fidelity.record import AutoRecord, FidelityRecord, Repair
from plait.fidelity.score import fidelities
from plait.fidelity.shift import hidden_shift
from plait.fidelity.texts import split_off
from plait.learning.checkpoint_files import Piece, settled
from plait.learning.checkpoint_reach import FINISHING, LEARNT_HEADS, MERGE, REPAIR, THE_HEADS, THE_REPAIR, WEIGHTS
from plait.learning.checkpoints import NOTHING_KEPT, Checkpoints
from plait.learning.head_learning import Groups, with_learnt_heads
from plait.learning.heads import with_heads
from plait.learning.learning_state import KeptLearning
from plait.learning.repair import TEXTS_TO_REPAIR, repaired
from plait.progress import OnProgress


@dataclass(frozen=True, slots=True)
class Midway:
    """A chosen merge on its way.

    Args:
        merge: What was chosen, cut to its rank.
        record: What is known of it.
        groups: Module -> which of the merge's ranks are one adapter's, where they still are.
        after: What was done to it since, as a person reads it.
    """

    merge: Adapter
    record: AutoRecord
    groups: Groups
    after: Sequence[str] = ()

    @classmethod
    def of(cls, checkpoints: Checkpoints, record: AutoRecord, panel: Panel) -> Midway | None:
        """Take it from where it is kept; None where nothing is chosen yet.

        Args:
            checkpoints: Where it is kept.
            record: What is known before anything is chosen. A repair that is asked for since reads more of text models' texts.
            panel: Base, adapters and all texts.
        """
        piece = checkpoints.piece(FINISHING) or checkpoints.piece(MERGE)
        if piece is None:
            return None
        values = piece.values
        known = from_json(AutoRecord, values["record"])
        if not values["after"]:
            texts = {t: len(rows) for t, rows in panel.texts.items()}
            known = replace(known, chat=record.chat, notes=record.notes, texts=texts)
        return cls(piece.adapters[MERGE], known, values["groups"], values["after"])

    def kept_in(self, checkpoints: Checkpoints) -> Midway:
        """Keep it, and give what goes on from there.

        What was chosen stays beside what was done to it since, and scores and fits stay too, which are small: another option may
        reach the later ones alone (`plait.learning.checkpoint_reach`).
        """
        merge = settled(self.merge)
        values = {"record": to_json(self.record), "groups": dict(self.groups), "after": list(self.after)}
        name, gone = (FINISHING, REPAIR) if self.after else (MERGE, WEIGHTS)
        checkpoints.keep(name, lambda: Piece(values, adapters={MERGE: merge}), instead_of=(gone,))
        return replace(self, merge=merge)


def finished(
    begun: Midway,
    panel: Panel,
    settings: AutoSettings,
    *,
    on_progress: OnProgress = lambda _: None,
    checkpoints: Checkpoints = NOTHING_KEPT,
) -> tuple[Adapter, AutoRecord, Fidelity]:
    """Finish a merge after its cut, so that a repair makes good what the cut lost; `advise` measures it in this order.

    Args:
        begun: What was chosen, and what was done to it already.
        panel: Base, adapters and all texts.
        settings: What is asked for; what it does not ask for is left out.
        on_progress: Called with what is being done.
        checkpoints: Where it goes on from, and is kept after each step.

    Returns:
        The merge, the record of all that was done, and its fidelity on all texts.

    Raises:
        RunError: The cut itself moves general text beyond the limit.
    """
    finishing = _Finishing(panel, settings, on_progress, checkpoints)
    steps: dict[str, Callable[[Adapter, AutoRecord], tuple[Adapter, AutoRecord]]] = {
        THE_REPAIR: finishing.repair,
        LEARNT_HEADS: partial(finishing.learn_heads, groups=begun.groups),
        THE_HEADS: finishing.refit_heads,
    }
    for name, step in steps.items():
        if name in begun.after:
            continue
        merge, record = step(begun.merge, begun.record)
        if record is not begun.record:
            begun = Midway(merge, record, begun.groups, (*begun.after, name)).kept_in(checkpoints)
    on_progress("what it keeps, on all texts")
    fidelity = measured(panel, begun.merge)
    require_within(fidelity, settings.max_shift, f"cut to rank {settings.rank} it", "a larger --rank")
    return begun.merge, replace(begun.record, fidelity=FidelityRecord.of(fidelity)), fidelity


def repair_steps(panel: Panel, steps: int, repair_from: int) -> int:
    """Say how many of the steps asked for a repair may take: none where `repair_from` wants more texts of classifiers than there are."""
    return 0 if too_few_to_repair(panel, repair_from) else steps


def require_within(fidelity: Fidelity | None, limit: float | None, what: str, hint: str) -> None:
    """Check a measured merge against the limit on general text, where there is one.

    Raises:
        RunError: It moves general text further; says what does, and by how much.
    """
    shift = fidelity.general_kl if fidelity else None
    if limit is not None and shift is not None and shift > limit:
        raise RunError(f"{what} moves general text by {shift:.3g} nats, and at most {limit:g} was asked for", hint=hint)


def measured(panel: Panel, merge: Adapter) -> Fidelity:
    """Measure a merge's fidelity on all texts, layer by layer."""
    fidelity = fidelities(panel, [(merge, 1.0)])[0]
    parts = {p.name: p for p in panel.parts}
    tasks = [replace(t, shift=hidden_shift(panel, parts[t.task], merge)) for t in fidelity.tasks]
    return Fidelity(tuple(tasks), fidelity.general_kl)


def judged_with_heads(panel: Panel, merge: Adapter, better: Adapter, repair: Repair) -> Repair:
    """Judge a repair that was kept once more, with the heads that will follow: what is compared is what comes out.

    A repair learns through the heads as they were. Heads that follow the merge from before may do as much, and do it in closed form. The
    divergence that a repair learns from may call it closer even then, where it keeps less (docs/results/existing-fitted.md). So it
    must also answer like its adapters more often. How far they are followed is no judge here: it rewards sureness, of which a repair
    takes some from a merge that was too sure.

    Args:
        panel: Base, adapters and texts.
        merge: Before the repair.
        better: After it.
        repair: What it did with the heads as they were.

    Returns:
        The same, kept only where on texts that neither the repair nor heads have learnt from it is closer with heads by the divergence, and
        agrees with its adapters more often beyond chance; unchanged where too few were there to hold any out.
    """
    if not repair.held_out:
        return repair
    most, rest = (panel.with_texts(texts, general=False) for texts in split_off(panel.texts))
    before, after = fidelities(rest, [(with_heads(most, m)[0], 1.0) for m in (merge, better)])
    held_out = {
        **repair.held_out,
        "merge, heads": before.kept,
        "repaired, heads": after.kept,
        "merge, heads: agreement": before.beyond_chance,
        "repaired, heads: agreement": after.beyond_chance,
    }
    kept = after.kept > before.kept and after.beyond_chance > before.beyond_chance
    return replace(repair, held_out=held_out, kept=kept)


@dataclass(frozen=True, slots=True)
class _Finishing:
    """The steps, each from a merge and its record to those after it.

    What moves general text beyond the limit is undone, and recorded as not kept.
    """

    panel: Panel
    settings: AutoSettings
    on_progress: OnProgress
    checkpoints: Checkpoints

    def repair(self, merge: Adapter, record: AutoRecord) -> tuple[Adapter, AutoRecord]:
        """Distil all adapters into it."""
        steps = self.settings.repair
        if not steps:
            return merge, record
        if few := too_few_to_repair(self.panel, self.settings.repair_from):
            return merge, replace(record, notes=(*record.notes, f"no repair is tried: {few}"))
        if few := too_few_to_repair(self.panel, TEXTS_TO_REPAIR):
            record = replace(record, notes=(*record.notes, f"a repair is tried as asked: {few}"))
        self.on_progress(f"repair: distilling all adapters into it, at most {plural(steps, 'step')}")
        better, done = repaired(
            self.panel,
            merge,
            steps,
            self.settings.seed,
            on_policy=self.settings.on_policy,
            keeping=KeptLearning(self.checkpoints, REPAIR),
            on_progress=self.on_progress,
        )
        if done.kept and self.settings.heads and not self.panel.is_text:
            done = judged_with_heads(self.panel, merge, better, done)
            better = better if done.kept else merge
        if not self._may_be(better):
            better, done, record = merge, replace(done, kept=False), _without(record, "the repair")
        return better, replace(record, repair=done)

    def learn_heads(self, merge: Adapter, record: AutoRecord, groups: Groups) -> tuple[Adapter, AutoRecord]:
        """Learn copies of the heads together with the weights of its parts; a repair that was kept has mixed the parts."""
        if not self.settings.learn_heads:
            return merge, record
        self.on_progress("heads and weights together")
        apart = {} if record.repair and record.repair.kept else groups
        better, learnt = with_learnt_heads(self.panel, merge, apart, seed=self.settings.seed)
        if learnt and not self._may_be(better):
            better, learnt, record = merge, replace(learnt, kept=False), _without(record, "learnt heads")
        return better, replace(record, learnt_heads=learnt)

    def refit_heads(self, merge: Adapter, record: AutoRecord) -> tuple[Adapter, AutoRecord]:
        """Let the heads follow it, where learnt ones were not kept."""
        learnt = record.learnt_heads
        if not self.settings.heads or self.panel.is_text or (learnt and learnt.kept):
            return merge, record
        self.on_progress("heads")
        better, heads = with_heads(self.panel, merge)
        if not self._may_be(better):
            better, heads = merge, tuple(replace(h, kept=False) for h in heads)
            record = _without(record, "the heads that follow it")
        return better, replace(record, heads=heads)

    def _may_be(self, merge: Adapter) -> bool:
        return within(self.panel, merge, self.settings.max_shift)


def _without(record: AutoRecord, step: str) -> AutoRecord:
    """Record a step that was taken back since it moves general text beyond the limit."""
    limit = record.limit
    return record if limit is None else replace(record, limit=replace(limit, steps=(*limit.steps, step)))
