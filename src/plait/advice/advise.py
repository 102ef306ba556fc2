"""Should these adapters be merged? The ways to serve them side by side, what each costs and keeps, and an honest answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from plait.adapters.lora import Adapter
from plait.advice import advice_without_texts
from plait.advice.advice_options import SEPARATELY, SINGLE, merged_name, options_of
from plait.advice.advice_settings import AdviceSettings as AdviceSettings
from plait.border.counts import plural
from plait.choosing import costs, notes
from plait.choosing.auto import GENERAL_ALONE, AutoMerge, at_rank, merge_auto
from plait.choosing.auto_settings import AutoSettings
from plait.choosing.counting import advising, seen_and_judged
from plait.choosing.duration import TIMING, told
from plait.choosing.finishing import repair_steps
from plait.errors import InputError, UsageError
from plait.fidelity.arguments import recorded_base, split_base
from plait.fidelity.chat import Chat
from plait.fidelity.measure import Fidelity
from plait.fidelity.panel import WRITTEN, Panel, parts_of
from plait.fidelity.ready_panel import ready_panel
from plait.fidelity.record import Advice, AutoRecord, Option, Repair
from plait.fidelity.score import fidelities
from plait.fidelity.texts import FEWEST, HELD_OUT, LIMIT, Rows, Texts, first_of, in_rows
from plait.learning.heads import with_heads
from plait.learning.repair import repaired
from plait.merging.align import align
from plait.merging.folders import read_all
from plait.model.base import BaseModel, base_folder
from plait.progress import OnProgress


def advise_folders(
    given: Sequence[str],
    texts: Mapping[str, Texts],
    general: Texts = (),
    settings: AdviceSettings | None = None,
    *,
    base_id: str | None = None,
    device: str = "auto",
    four_bits: str | None = None,
    on_progress: OnProgress = lambda _: None,
) -> Advice:
    """Advise on adapter folders, with or without a base, with or without texts.

    Args:
        given: BASE and folders, or folders alone: then a base folder that all of them name is the base.
        texts: Adapter -> some of its texts; {} for none: then nothing that needs them is claimed.
        general: Texts of no task.
        settings: See `AdviceSettings`.
        base_id: What the base is called, where the adapters name one base by different names.
        device: Where the base runs.
        four_bits: How the base is held where its adapters are of QLoRA, see `BaseModel`.
        on_progress: Called with what is being done.

    Raises:
        InputError: A path that is not there, or no adapter.
    """
    base, folders = split_base(given, device, four_bits=four_bits)
    adapters = read_all(folders)
    base = base or recorded_base(adapters, device, four_bits=four_bits)
    return advise(adapters, base, texts, general=general, settings=settings, base_id=base_id, on_progress=on_progress)


def advise(
    adapters: Sequence[Adapter],
    base: BaseModel | str | None = None,
    texts: Mapping[str, Rows] | None = None,
    *,
    general: Rows = (),
    settings: AdviceSettings | None = None,
    base_id: str | None = None,
    on_progress: OnProgress = lambda _: None,
) -> Advice:
    """List the options, what each costs and keeps, and recommend one; see `advise_folders`.

    With texts, all figures of fidelity are on the quarter of them that neither choice nor repair has seen.

    Adapters that cannot be merged (other bases, other shapes) are told to be served separately, with the reason.
    """
    chosen, base, general = settings or AdviceSettings(), BaseModel.of(base), in_rows(general)
    own = {task: in_rows(rows) for task, rows in (texts or {}).items()}
    if general and not own:
        raise UsageError(GENERAL_ALONE, hint="--text TASK=FILE for every adapter")
    sizes = _base_sizes(base)
    if composed := advice_without_texts.stacked(adapters):
        merged = options_of(adapters, sizes, {})[1:3]
        options = [replace(o, option=o.option.replace("merged", "composed"), kept=1.0, worst=1.0) for o in merged]
        return _advice(adapters, options, composed, "compose")
    if reason := _obstacle(adapters, base_id):
        return _advice(adapters, options_of(adapters, sizes, {})[:1], f"serve separately: {reason}", SEPARATELY)
    unknown = [] if sizes else [advice_without_texts.no_size(align(adapters, base_id).base)]
    if not own or base is None:
        unknown += advice_without_texts.unknown(adapters, base, bool(own))
        return _without_texts(adapters, base, sizes, chosen, base_id, unknown)
    if parts_of(adapters)[0].is_text:  # as `merge_auto` reads them
        own = first_of(own, LIMIT)
    on_progress(f"loading the base and cutting texts into tokens: {base.name}")
    panel, chat = ready_panel(  # the held-out texts too, which are read last, are looked at here
        base, adapters, own, general, chat=chosen.chat, answers=chosen.answers, new_tokens=chosen.new_tokens,
        max_length=chosen.max_length, on_progress=on_progress,
    )  # fmt: skip
    findings = _measured(panel, adapters, chosen, base_id, on_progress)
    return _with_texts(adapters, panel, chat, findings, sizes, chosen, unknown)


def _with_texts(
    adapters: Sequence[Adapter],
    panel: Panel,
    chat: Chat,
    findings: _Findings,
    sizes: tuple[int, int] | None,
    settings: AdviceSettings,
    unknown: Sequence[str],
) -> Advice:
    """Advise by what was measured: the cheapest option that keeps enough, what these texts cannot tell, and the next command."""
    options = options_of(adapters, sizes, findings.kept)
    advice, name = recommend(options, settings)
    seen = seen_and_judged(panel)[0]
    few = notes.few(seen, FEWEST, refine=settings.refine > 0)
    if settings.repair and (why := notes.too_few_to_repair(seen, settings.repair_from)):
        few.append(f"no repair is tried: {why} (choice and repair read three quarters of the texts here)")
    remarks = [*notes.other_base(adapters, panel.base), *chat.notes, *few]
    return replace(
        _advice(adapters, options, advice, name, [*unknown, *_untold(panel, findings)], findings, remarks),
        next=notes.that_merge(adapters, panel.base, name, settings.repair, chat=chat),
        then=notes.that_model(panel.base, name),
    )


def _untold(panel: Panel, findings: _Findings) -> list[str]:
    """Say what these texts cannot tell."""
    measured = list(findings.kept.values())
    classifiers = [p.name for p in panel.parts if p.task.kind == "classification"]
    untold = [*notes.alike(measured), *notes.coarse(measured[0], classifiers)]
    if min(map(len, panel.texts.values())) < HELD_OUT:
        untold.append(
            f"how figures hold on other texts: with fewer than {HELD_OUT} of an adapter none could be held out"
        )
    return untold


def _without_texts(
    adapters: Sequence[Adapter],
    base: BaseModel | None,
    sizes: tuple[int, int] | None,
    settings: AdviceSettings,
    base_id: str | None,
    unknown: Sequence[str],
) -> Advice:
    """Advise by the factors alone: what the options take, and that it should be measured what they keep."""
    factors = [
        replace(a, extras={}, modules_to_save=()) for a in adapters
    ]  # what lies beside them is said in the notes
    merged = merge_auto(factors, settings=AutoSettings(seed=settings.seed), base_id=base_id)
    advice = advice_without_texts.without_texts(adapters, merged, base)
    findings = _Findings({}, merged.record, akin=merged.akin)
    options = options_of(adapters, sizes, {})
    return _advice(adapters, options, advice, "measure first", unknown, findings)


def _obstacle(adapters: Sequence[Adapter], base_id: str | None) -> str | None:
    """Why there is nothing to merge, or no way to."""
    if len(adapters) == 1:
        return "one adapter alone has nothing to merge with (bake it with plait merge --bake for speed)."
    try:
        align(adapters, base_id)
    except InputError as e:
        return f"these adapters cannot be merged. {e}"
    return None


@dataclass(frozen=True, slots=True)
class _Findings:
    """What was measured: the fidelity of each option on held-out texts, the merge that was looked at, its repair, and who is akin."""

    kept: Mapping[str, Fidelity]
    merge: AutoRecord
    repair: Repair | None = None
    akin: tuple[tuple[str, str, float], ...] = ()


def _advice(
    adapters: Sequence[Adapter],
    options: Sequence[Option],
    advice: str,
    recommended: str,
    unknown: Sequence[str] = (),
    findings: _Findings | None = None,
    remarks: Sequence[str] = (),
) -> Advice:
    said = [*remarks, *notes.beside(adapters), *notes.serving(adapters)]
    if recommended not in (SEPARATELY, "compose") or len({a.base for a in adapters}) == 1:
        said = [*notes.kinship(notes.kin(adapters) if findings is None else findings.akin), *said]
    return Advice(
        tasks=tuple(a.name for a in adapters),
        base=adapters[0].base,
        options=tuple(options),
        notes=tuple(said),
        unknown=tuple(unknown),
        advice=advice,
        recommended=recommended,
        chosen=findings.merge.chosen if findings else None,
        evidence=findings.merge.evidence if findings else (),
        repair=findings.repair if findings else None,
    )


def _measured(
    panel: Panel, adapters: Sequence[Adapter], settings: AdviceSettings, base_id: str | None, on_progress: OnProgress
) -> _Findings:
    """Measure the fidelity of every option on held-out texts."""
    seen, judged = seen_and_judged(panel)
    settings = replace(settings, repair=repair_steps(seen, settings.repair, settings.repair_from))
    # Heads follow each arm by itself, below: after its cut and its repair.
    auto = AutoSettings(
        refine=settings.refine, heads=False, max_length=settings.max_length, seed=settings.seed, chat=panel.chat,
        answers=panel.positions == WRITTEN, new_tokens=settings.new_tokens,
    )  # fmt: skip
    on_progress(TIMING)
    on_progress(told(panel, adapters, advising(seen, judged, adapters, auto, settings.repair)))
    merged = merge_auto(
        adapters, panel.base, seen.texts, general=panel.general, settings=auto, base_id=base_id, announce=False,
        known=panel, on_progress=on_progress,
    )  # fmt: skip
    arms, repair = _arms(merged, seen, adapters, settings, base_id, on_progress)
    singles = {f"{a.name} alone": a for a in adapters}
    scored = fidelities(judged, [(a, 1.0) for a in (*arms.values(), *singles.values())])
    by_name = dict(zip((*arms, *singles), scored, strict=True))
    best = max(singles, key=lambda name: by_name[name].score)
    kept = {name: by_name[name] for name in arms} | {f"{SINGLE} ({best.removesuffix(' alone')})": by_name[best]}
    return _Findings(kept, merged.record, repair, merged.akin)


def _arms(
    merged: AutoMerge,
    seen: Panel,
    adapters: Sequence[Adapter],
    settings: AdviceSettings,
    base_id: str | None,
    on_progress: OnProgress,
) -> tuple[dict[str, Adapter], Repair | None]:
    """What could be served in place of the adapters: the merge at its rank and at one adapter's, each repaired too, with heads that follow.

    Returns:
        Name -> merge, and what the repair at the smallest rank did.
    """
    r, R = max(a.rank for a in adapters), costs.total_rank(adapters)
    merges = {R: merged.adapter}
    if r < R and merged.choice is not None:
        on_progress(f"the same at rank {r}")
        merges[r] = at_rank(merged.choice, seen, adapters, r, base_id=base_id, on_progress=on_progress)
    arms = {merged_name(rank, R): merge for rank, merge in merges.items()}
    repair = None
    if settings.repair:
        on_progress(
            f"repair at {'two ranks' if len(merges) > 1 else 'its rank'}, at most {plural(settings.repair, 'step')} each"
        )
        for rank, merge in sorted(merges.items()):
            better, done = repaired(seen, merge, settings.repair, settings.seed, on_progress=on_progress)
            arms[f"merged and repaired, rank {rank}"], repair = better, repair or done
    return {name: with_heads(seen, a)[0] for name, a in arms.items()}, repair


def _base_sizes(base: BaseModel | None) -> tuple[int, int] | None:
    return costs.base_size(base_folder(base, weights=True)) if base is not None else None


def recommend(options: Sequence[Option], settings: AdviceSettings) -> tuple[str, str]:
    """Recommend the cheapest option that keeps enough of the worst adapter; else serving separately.

    >>> options = [Option(SEPARATELY, "", 9, "", 1.0, 1.0), Option("merged, rank 8", "", 5, "", 0.97, 0.93, "sst2")]
    >>> recommend(options, AdviceSettings(tolerate=0.1))[1]
    'merged, rank 8'
    """
    enough = 1.0 - settings.tolerate
    good = [o for o in options if o.option != SEPARATELY and o.worst is not None and o.worst >= enough]
    # A repair moves the model on inputs nobody looked at; so a merge without one goes before it, whatever it weighs.
    good.sort(key=lambda o: ("repaired" in o.option, o.bytes))
    if good:
        o = good[0]
        return (
            f"{o.option}: keeps at least {100 * (o.worst or 0):.0f} % of every adapter on texts it has not seen.",
            o.option,
        )
    merges = [o for o in options if o.kept is not None and o.option != SEPARATELY]
    best = max(merges, key=lambda o: o.worst if o.worst is not None else float("-inf"))
    return (
        f"serve separately: even {best.option} keeps only {100 * (best.worst or 0):.0f} % of {best.worst_task}; "
        f"at least {100 * enough:.0f} % was wanted (--tolerate).",
        SEPARATELY,
    )
