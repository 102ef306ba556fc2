"""`merge auto`: the whole choice, from folders to a folder, with texts or from factors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from plait.adapters.carried import require_exact
from plait.adapters.lora import Adapter
from plait.choosing.auto_settings import AutoSettings as AutoSettings
from plait.choosing.candidates import groups_of
from plait.choosing.choose import Choice, choose, with_fit
from plait.choosing.counting import Behind, making
from plait.choosing.duration import TIMING, told
from plait.choosing.factors_only import choose_by_factors
from plait.choosing.finishing import Midway, finished, measured, require_within
from plait.choosing.notes import alike, beside, few, kin, kinship, other_base, worth_a_repair
from plait.choosing.proxy import OWN_SHARE
from plait.errors import UsageError
from plait.fidelity.limit import LeftOut, Limit
from plait.fidelity.measure import Fidelity
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.ready_panel import ready_panel
from plait.fidelity.record import AutoRecord, Chosen, FidelityRecord
from plait.fidelity.texts import FEWEST, Rows, Texts, first_of, in_rows
from plait.learning.checkpoints import NOTHING_KEPT, Checkpoints
from plait.learning.head_learning import Groups
from plait.merging.align import align
from plait.merging.metric_cut import InputMetric, cut_adapter
from plait.merging.record import IN_THE_METRIC, input_of, labels_of, loss_of
from plait.model.base import BaseModel
from plait.progress import OnProgress

GENERAL_ALONE = "how far general texts are moved is measured beside the adapters' own texts, and there are none"


@dataclass(frozen=True, slots=True)
class AutoMerge:
    """A merge that was chosen.

    Args:
        adapter: The result.
        fidelity: Fidelity of the result on all texts, with hidden-state shifts; None without texts.
        record: What was chosen, the evidence, the inputs.
        akin: Pairs of adapters that point the same way, with the cosine.
        choice: What was chosen with texts, before cut, repair and heads; None without, and where that was done by an earlier run.
    """

    adapter: Adapter
    fidelity: Fidelity | None
    record: AutoRecord
    akin: tuple[tuple[str, str, float], ...] = ()
    choice: Choice | None = None


def merge_auto(
    adapters: Sequence[Adapter],
    base: BaseModel | str | None = None,
    texts: Mapping[str, Rows] | None = None,
    *,
    general: Rows = (),
    settings: AutoSettings | None = None,
    base_id: str | None = None,
    announce: bool = True,
    known: Panel | None = None,
    checkpoints: Checkpoints = NOTHING_KEPT,
    on_progress: OnProgress = lambda _: None,
) -> AutoMerge:
    """Merge adapters by the method, weights and scale that keep most of each, chosen without labels.

    With texts, every method with and without pico at every scale is scored by fidelity (`plait.fidelity.measure`), and
    the winner's weights per adapter and module are learnt on them, or it is fitted front to back; without, `choose_by_factors` decides.

    Args:
        adapters: At least one; a single one comes back unchanged.
        base: The base, or its name or folder; needed with texts.
        texts: Adapter (or head) -> some of the texts it was made for, unlabelled: strings, or pairs of them.
        general: Texts of no task in particular, for the KL to the base.
        settings: See `AutoSettings`.
        base_id: Base id of the result where the adapters name one base by different names.
        announce: Whether to say, with texts, that the base is loaded and how long it will take, which is timed on a few of them.
        known: Panel whose answers are taken over, see `ready_panel`.
        checkpoints: With texts, where it goes on from, and where what is done is kept, see `merge_auto_folders`.
        on_progress: Called with what is being done.

    Raises:
        UsageError: Texts without a base, for some adapters only, or for none of them; what is done on texts (a repair, heads that are
            learnt, a limit on general texts) without any; a repair of one adapter alone, or its head learnt; heads of text models.
        InputError: Adapters of different bases; one that makes no predictions.
        RunError: Nothing is within `max_shift`.
    """
    settings, base, general = settings or AutoSettings(), BaseModel.of(base), in_rows(general)
    own = {task: in_rows(rows) for task, rows in (texts or {}).items()}
    akin, record = _inputs_of(adapters, base if own else None, base_id)
    if not own:
        _require_no_texts_needed(settings, general)
        return replace(_without_texts(adapters, settings, base_id, record, akin), akin=tuple(akin))
    if base is None:
        raise UsageError("texts are read by the base model, and none was given", hint="its folder or name comes first")
    if settings.max_shift is not None and not general:
        raise UsageError("max_shift limits the KL on general texts, and there are none", hint="--general FILE")
    if parts_of(adapters)[0].is_text and not settings.repair:  # nothing reads more of them
        own = first_of(own, settings.texts)
    if announce:
        on_progress(f"loading the base and cutting texts into tokens: {base.name}")
    panel, chat = ready_panel(
        base, adapters, own, general, chat=settings.chat, answers=settings.answers, on_policy=settings.on_policy,
        known=known or checkpoints.known(base, adapters, own), on_written=checkpoints.watch_writing,
        new_tokens=settings.new_tokens, batch_size=settings.batch_size, max_length=settings.max_length,
        on_progress=on_progress,
    )  # fmt: skip
    record = replace(record, chat=chat.record, notes=(*record.notes, *chat.notes))
    if settings.learn_heads and panel.is_text:
        raise UsageError(
            "heads are learnt of classifiers, and these adapters write text", hint="leave --learn-heads out"
        )
    if len(adapters) == 1:
        return _alone(adapters[0], panel, settings, record)
    checkpoints.watch(panel)
    read = panel.with_texts(first_of(panel.texts, settings.texts))
    if announce:
        on_progress(TIMING)
        on_progress(told(panel, adapters, making(panel, read, settings, Behind.of(checkpoints))))
    choice, begun = None, Midway.of(checkpoints, record, panel)
    if begun is None:
        choice = choose(read, adapters, settings, base=base_id, on_progress=on_progress, checkpoints=checkpoints)
        begun = _cut_choice(choice, adapters, settings, _with_evidence(record, choice, panel)).kept_in(checkpoints)
    adapter, record, fidelity = finished(begun, panel, settings, on_progress=on_progress, checkpoints=checkpoints)
    record = replace(record, notes=(*record.notes, *_of_texts(panel, settings, fidelity)))
    return AutoMerge(adapter, fidelity, record, tuple(akin), choice)


def _inputs_of(
    adapters: Sequence[Adapter], base: BaseModel | None, base_id: str | None
) -> tuple[list[tuple[str, str, float]], AutoRecord]:
    """Check that adapters go together; who of them is akin, and what is known before anything is chosen."""
    common = align(adapters, base_id)
    if len(adapters) > 1:
        require_exact(adapters, None, "what is chosen here")
    akin = kin(adapters)
    notes = (*kinship(akin), *beside(adapters), *other_base(adapters, base))
    record = AutoRecord(
        tasks=tuple(a.name for a in adapters), base=common.base, backbone_prefix=common.backbone_prefix,
        adapters=tuple(input_of(a, 1.0) for a in adapters), labels=labels_of(adapters) or None, notes=notes,
        chosen=Chosen("the only adapter", 1.0),
    )  # fmt: skip
    return akin, record


def _cut_choice(choice: Choice, adapters: Sequence[Adapter], settings: AutoSettings, record: AutoRecord) -> Midway:
    """Cut what was chosen to the rank asked for."""
    record = replace(record, limit=_limit(choice, settings.max_shift))
    cut = _cut(AutoMerge(choice.adapter, None, record), settings.rank, choice.metric)
    return Midway(cut.adapter, cut.record, _parts_apart(cut.adapter, choice, adapters))


def at_rank(
    choice: Choice,
    panel: Panel,
    adapters: Sequence[Adapter],
    rank: int,
    *,
    base_id: str | None = None,
    on_progress: OnProgress = lambda _: None,
) -> Adapter:
    """Give the merge that `merge_auto` makes of the same texts at a rank, before repair and heads.

    The rank decides nothing before the fit, so that what was tried before it is not tried again.

    Args:
        choice: What was chosen without a rank.
        panel: Base, adapters and the texts that it was chosen on.
        adapters: What was merged.
        rank: At least 1.
        base_id: As `merge_auto` has it.
        on_progress: Called with what is being done.

    Cost: three fits where one was tried, else a cut.
    """
    if choice.unfitted is not None:
        settings = AutoSettings(rank=rank)
        choice = with_fit(choice.unfitted, panel, adapters, settings, base=base_id, on_progress=on_progress)
    return cut_adapter(choice.adapter, rank, choice.metric)[0]


def _of_texts(panel: Panel, settings: AutoSettings, fidelity: Fidelity) -> list[str]:
    """What should be known of the texts: where they are too few, and where they tell nothing."""
    lacking = few(panel, FEWEST, refine=settings.refine > 0, fit=settings.fit, heads=settings.heads)
    more = [] if settings.repair else worth_a_repair(panel)
    return [*lacking, *(f"not known: {n}" for n in alike([fidelity])), *more]


def _require_no_texts_needed(settings: AutoSettings, general: Texts) -> None:
    """Refuse what is done on texts where there are none: passed over, a limit would not be one."""
    hint = "--text TASK=FILE for every adapter"
    if settings.repair:
        raise UsageError("a repair distils on texts, and there are none", hint=hint)
    if settings.learn_heads:
        raise UsageError("heads are learnt on texts, and there are none", hint=hint)
    if general or settings.max_shift is not None:
        raise UsageError(GENERAL_ALONE, hint=hint)


def _parts_apart(merge: Adapter, choice: Choice, adapters: Sequence[Adapter]) -> Groups:
    """Which ranks of a merge are one adapter's, where they still are."""
    apart = groups_of(choice.scored[0].tried, adapters) if choice.fit is None else {}
    return {m: apart[m] for m, f in merge.modules.items() if m in apart and sum(apart[m]) == f.rank}


def _without_texts(
    adapters: Sequence[Adapter],
    settings: AutoSettings,
    base_id: str | None,
    record: AutoRecord,
    akin: Sequence[tuple[str, str, float]],
) -> AutoMerge:
    if len(adapters) == 1:
        return _cut(AutoMerge(adapters[0], None, record), settings.rank)
    choice = choose_by_factors(adapters, settings.methods, settings.scales, base_id, akin, settings.rank)
    record = replace(record, chosen=choice.chosen, assumed={"own_share": OWN_SHARE}, evidence=choice.evidence)
    return _cut(AutoMerge(choice.adapter, None, record), settings.rank)


def _with_evidence(record: AutoRecord, choice: Choice, panel: Panel) -> AutoRecord:
    return replace(
        record,
        chosen=_chosen(choice),
        held_out=dict(choice.held_out),
        texts={t: len(x) for t, x in panel.texts.items()},
        evidence=tuple(s.evidence for s in choice.scored),
    )


def _limit(choice: Choice, most: float | None) -> Limit | None:
    """Record what a limit on general text left out, where there is one."""
    if most is None:
        return None
    beyond = sorted((s for s in choice.scored if not s.within(most)), key=lambda s: -s.fidelity.score)
    left_out = [LeftOut(s.tried.recipe.label, s.scale, s.fidelity.score, s.fidelity.general_kl or 0.0) for s in beyond]
    return Limit(most, len(choice.scored), tuple(left_out), choice.beyond)


def _chosen(choice: Choice) -> Chosen:
    recipe = choice.recipe
    weights = {m: list(w) for m, w in choice.weights.items()}
    fit = asdict(choice.fit) if choice.fit else None
    return Chosen(recipe.label, choice.scale, recipe.method, recipe.calibrate, recipe.moments, weights, fit=fit)


def _alone(adapter: Adapter, panel: Panel, settings: AutoSettings, record: AutoRecord) -> AutoMerge:
    """One adapter, cut where a rank is asked for, and measured."""
    if settings.repair or settings.learn_heads:
        raise UsageError(
            "one adapter alone stays as it is: there is nothing to repair and no head to learn", hint="leave that out"
        )
    merge = _cut(AutoMerge(adapter, None, record), settings.rank)
    fidelity = measured(panel, merge.adapter)
    require_within(fidelity, settings.max_shift, f"{adapter.name} by itself", "a larger --max-shift")
    limit = None if settings.max_shift is None else Limit(settings.max_shift, 1)
    return replace(
        merge, fidelity=fidelity, record=replace(merge.record, fidelity=FidelityRecord.of(fidelity), limit=limit)
    )


def _cut(merge: AutoMerge, rank: int | None, metric: InputMetric | None = None) -> AutoMerge:
    """The merge cut to a rank: where there are texts of every module so that outputs on them stay nearest, else by weights."""
    adapter, lost = merge.adapter, dict.fromkeys(merge.adapter.modules, 0.0)
    if rank is not None:
        adapter, lost = cut_adapter(adapter, rank, metric)
    cut = metric is not None and any(lost.values())
    kept = {m: metric.energy(m, f) for m, f in adapter.modules.items()} if cut and metric else None
    loss = loss_of(adapter.modules, lost, kept)
    record = replace(merge.record, rank=adapter.rank, loss=loss, cut=IN_THE_METRIC if cut else None)
    return AutoMerge(adapter, merge.fidelity, record)
