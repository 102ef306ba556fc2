"""`merge auto`: the whole choice, from folders to a folder, with texts or from factors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from plait.adapters.carried import require_exact
from plait.adapters.lora import Adapter
from plait.errors import RunError, UsageError
from plait.fidelity.candidates import METHODS, SCALES, groups_of
from plait.fidelity.choose import Choice, choose, with_fit, within
from plait.fidelity.counting import making
from plait.fidelity.duration import told
from plait.fidelity.factors_only import choose_by_factors
from plait.fidelity.head_learning import STEPS, Groups, with_learnt_heads
from plait.fidelity.heads import with_heads
from plait.fidelity.measure import Fidelity
from plait.fidelity.notes import beside, kin, kinship, other_base
from plait.fidelity.panel import Panel
from plait.fidelity.proxy import OWN_SHARE
from plait.fidelity.ready_panel import ready_panel
from plait.fidelity.record import AutoRecord, Chosen, FidelityRecord
from plait.fidelity.repair import repaired
from plait.fidelity.score import fidelities
from plait.fidelity.shift import hidden_shift
from plait.fidelity.texts import LIMIT, Texts, first_of
from plait.merging.align import align
from plait.merging.metric_cut import InputMetric, cut_adapter
from plait.merging.record import IN_THE_METRIC, input_of, labels_of, loss_of
from plait.model.base import BaseModel
from plait.progress import OnProgress


@dataclass(frozen=True, slots=True)
class AutoSettings:
    """What `merge_auto` may be told.

    Args:
        methods, scales: What is tried.
        refine: Steps in which the winner's weights per adapter and module are learnt from the texts; 0 for none.
        fit: Whether the winner is also fitted to the adapters' outputs on the texts, front to back.
        repair: Steps at most in which all adapters are distilled into the winner's factors, after the cut to rank; 0 for none.
        on_policy: Whether the merge writes after the prompts and the adapters judge it while it is repaired; causal adapters only.
        texts: Texts of each adapter that the choice reads; a repair, heads and what is measured at the end read all.
        heads: Whether the last layer of every classifier's head is fitted to the merged model, where that is closer.
        learn_heads: Whether copies of the heads are learnt together with the merge's weights, and taken where that is closer still.
        max_shift: Most KL to the base on the general texts, in nats: whatever moves the model further is left out.
        answers: Whether texts are prompts and adapters are followed in their own answers; None where they are if the adapters are causal.
        chat: Whether prompts go through the tokenizer's chat template, which means answers; None where tokenizer and adapters decide
            (`plait.fidelity.chat.chat_of`).
        new_tokens: Tokens of such an answer, at most.
        rank: Cut the result to this rank.
        max_length: Tokens a text.
        batch_size: Texts a pass, where a model is asked alone.
        seed: Seed of the order of the texts.
    """

    methods: tuple[str, ...] = METHODS
    scales: tuple[float, ...] = SCALES
    refine: int = 100
    fit: bool = True
    repair: int = 0
    on_policy: bool = False
    texts: int = LIMIT
    heads: bool = True
    learn_heads: bool = False
    max_shift: float | None = None
    answers: bool | None = False
    chat: bool | None = None
    new_tokens: int = 64
    rank: int | None = None
    max_length: int = 128
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods or not self.scales:
            raise UsageError("nothing to try: methods and scales must not be empty")
        if any(not 0 < s < 100 for s in self.scales):
            raise UsageError(f"scales {list(self.scales)}, expected numbers above 0")
        if self.max_shift is not None and not self.max_shift > 0:
            raise UsageError(f"max_shift is {self.max_shift:g}, expected nats above 0")
        if self.on_policy and not self.repair:
            raise UsageError("on_policy is a way to repair, and no repair is asked for", hint="--repair auto")
        if min(self.texts, self.new_tokens) < 1:
            raise UsageError("texts and new_tokens are at least 1")
        if min(self.refine, self.repair) < 0 or (self.rank is not None and self.rank < 1):
            raise UsageError("steps must not be negative, and a rank is at least 1")


@dataclass(frozen=True, slots=True)
class AutoMerge:
    """A merge that was chosen.

    Args:
        adapter: The result.
        fidelity: Fidelity of the result on all texts, with hidden-state shifts; None without texts.
        record: What was chosen, the evidence, the inputs.
        akin: Pairs of adapters that point the same way, with the cosine.
        choice: What was chosen with texts, before cut, repair and heads; None without.
    """

    adapter: Adapter
    fidelity: Fidelity | None
    record: AutoRecord
    akin: tuple[tuple[str, str, float], ...] = ()
    choice: Choice | None = None


def merge_auto(
    adapters: Sequence[Adapter],
    base: BaseModel | None = None,
    texts: Mapping[str, Texts] | None = None,
    *,
    general: Texts = (),
    settings: AutoSettings | None = None,
    base_id: str | None = None,
    announce: bool = True,
    known: Panel | None = None,
    on_progress: OnProgress = lambda _: None,
) -> AutoMerge:
    """Merge adapters by the method, weights and scale that keep most of each, chosen without labels.

    With texts, every method with and without pico at every scale is scored by fidelity (`plait.fidelity.measure`), and
    the winner's weights per adapter and module are learnt on them, or it is fitted front to back; without, `choose_by_factors` decides.

    Args:
        adapters: At least one; a single one comes back unchanged.
        base: Needed with texts.
        texts: Adapter (or head) -> some of the texts it was made for, unlabelled.
        general: Texts of no task in particular, for the KL to the base.
        settings: See `AutoSettings`.
        base_id: Base id of the result where the adapters name one base by different names.
        announce: Whether to say first how long it will take with texts, which is timed on a few of them.
        known: Panel whose answers are taken over, see `ready_panel`.
        on_progress: Called with what is being done.

    Raises:
        UsageError: Texts without a base, for some adapters only, or for none of them; a repair without texts.
        InputError: Adapters of different bases; one that makes no predictions.
    """
    chosen = settings or AutoSettings()
    common = align(adapters, base_id)
    if len(adapters) > 1:
        require_exact(adapters, None, "what is chosen here")
    akin = kin(adapters)
    record = AutoRecord(
        tasks=tuple(a.name for a in adapters),
        base=common.base,
        backbone_prefix=common.backbone_prefix,
        adapters=tuple(input_of(a, 1.0) for a in adapters),
        labels=labels_of(adapters) or None,
        notes=(*kinship(akin), *beside(adapters), *(other_base(adapters, base) if texts else ())),
        chosen=Chosen("the only adapter", 1.0),
    )
    if not texts:
        if chosen.repair:
            raise UsageError("a repair distils on texts, and there are none", hint="--text TASK=FILE for every adapter")
        return replace(_without_texts(adapters, chosen, base_id, record, akin), akin=tuple(akin))
    if base is None:
        raise UsageError("texts are read by the base model, and none was given", hint="its folder or name comes first")
    if chosen.max_shift is not None and not general:
        raise UsageError("max_shift limits the KL on general texts, and there are none", hint="--general FILE")
    panel, chat = ready_panel(
        base, adapters, texts, general, chat=chosen.chat, answers=chosen.answers, on_policy=chosen.on_policy, known=known,
        new_tokens=chosen.new_tokens, batch_size=chosen.batch_size, max_length=chosen.max_length, on_progress=on_progress,
    )  # fmt: skip
    record = replace(record, chat=chat.record, notes=(*record.notes, *chat.notes))
    if len(adapters) == 1:
        return _measured(_cut(AutoMerge(adapters[0], None, record), chosen.rank), panel)
    read = panel.with_texts(first_of(panel.texts, chosen.texts))
    if announce:
        on_progress(told(panel, adapters, making(
            panel, read, chosen.methods, chosen.scales, refine=chosen.refine, fit=chosen.fit, repair=chosen.repair,
            head_steps=STEPS * chosen.learn_heads, max_shift=chosen.max_shift)))  # fmt: skip
    choice = choose(
        read, adapters, methods=chosen.methods, scales=chosen.scales, refine=chosen.refine, fit=chosen.fit,
        rank=chosen.rank, max_shift=chosen.max_shift, seed=chosen.seed, base=base_id, on_progress=on_progress,
    )  # fmt: skip
    record = replace(
        record,
        chosen=_chosen(choice),
        held_out=dict(choice.held_out),
        texts={t: len(x) for t, x in panel.texts.items()},
        evidence=tuple(s.evidence for s in choice.scored),
    )
    merged = _cut(AutoMerge(choice.adapter, None, record), chosen.rank, choice.metric)
    done = _finished(merged, panel, chosen, _parts_apart(merged.adapter, choice, adapters), on_progress)
    return replace(done, akin=tuple(akin), choice=choice)


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
        choice = with_fit(choice.unfitted, panel, adapters, rank=rank, base=base_id, on_progress=on_progress)
    return cut_adapter(choice.adapter, rank, choice.metric)[0]


def _parts_apart(merge: Adapter, choice: Choice, adapters: Sequence[Adapter]) -> Groups:
    """Which ranks of a merge are one adapter's, where they still are."""
    apart = groups_of(choice.scored[0].tried, adapters) if choice.fit is None else {}
    return {m: apart[m] for m, f in merge.modules.items() if m in apart and sum(apart[m]) == f.rank}


def _finished(
    merged: AutoMerge, panel: Panel, chosen: AutoSettings, groups: Groups, on_progress: OnProgress
) -> AutoMerge:
    """A merge after its cut: repaired, with heads that follow, within the limit on general text, and measured."""
    if chosen.repair:  # after the cut, so that it makes good what the cut loses; `advise` measures it in this order
        on_progress(f"repair: distilling all adapters into it, at most {chosen.repair} steps")
        adapter, done = repaired(
            panel, merged.adapter, chosen.repair, chosen.seed, on_policy=chosen.on_policy, on_progress=on_progress
        )
        if not within(panel, adapter, chosen.max_shift):
            adapter, done = merged.adapter, replace(done, kept=False)
        merged = AutoMerge(adapter, None, replace(merged.record, repair=done))
    learnt = None
    if chosen.learn_heads:
        on_progress("heads and weights together")
        apart = {} if merged.record.repair and merged.record.repair.kept else groups
        adapter, learnt = with_learnt_heads(panel, merged.adapter, apart, seed=chosen.seed)
        if learnt and not within(panel, adapter, chosen.max_shift):
            adapter, learnt = merged.adapter, replace(learnt, kept=False)
        merged = AutoMerge(adapter, None, replace(merged.record, learnt_heads=learnt))
    if chosen.heads and not (learnt and learnt.kept):
        on_progress("heads")
        adapter, heads = with_heads(panel, merged.adapter)
        if not within(panel, adapter, chosen.max_shift):
            adapter, heads = merged.adapter, tuple(replace(h, kept=False) for h in heads)
        merged = AutoMerge(adapter, None, replace(merged.record, heads=heads))
    measured = _measured(merged, panel)
    shift = measured.fidelity.general_kl if measured.fidelity else None
    if chosen.max_shift is not None and shift is not None and shift > chosen.max_shift:
        raise RunError(f"cut to rank {chosen.rank} it moves general text by {shift:.3g} nats", hint="a larger --rank")
    return measured


def _without_texts(
    adapters: Sequence[Adapter],
    settings: AutoSettings,
    base_id: str | None,
    record: AutoRecord,
    akin: Sequence[tuple[str, str, float]],
) -> AutoMerge:
    if len(adapters) == 1:
        return _cut(AutoMerge(adapters[0], None, record), settings.rank)
    choice = choose_by_factors(adapters, settings.methods, settings.scales, base_id, akin)
    record = replace(record, chosen=choice.chosen, assumed={"own_share": OWN_SHARE}, evidence=choice.evidence)
    return _cut(AutoMerge(choice.adapter, None, record), settings.rank)


def _chosen(choice: Choice) -> Chosen:
    recipe = choice.recipe
    weights = {m: list(w) for m, w in choice.weights.items()}
    fit = asdict(choice.fit) if choice.fit else None
    return Chosen(recipe.label, choice.scale, recipe.method, recipe.calibrate, recipe.moments, weights, fit=fit)


def _measured(merge: AutoMerge, panel: Panel) -> AutoMerge:
    """The same with its fidelity on all texts, layer by layer."""
    fidelity = fidelities(panel, [(merge.adapter, 1.0)])[0]
    parts = {p.name: p for p in panel.parts}
    tasks = [replace(t, shift=hidden_shift(panel, parts[t.task], merge.adapter)) for t in fidelity.tasks]
    whole = Fidelity(tuple(tasks), fidelity.general_kl)
    return AutoMerge(merge.adapter, whole, replace(merge.record, fidelity=FidelityRecord.of(whole)))


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
