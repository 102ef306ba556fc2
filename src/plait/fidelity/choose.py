"""Choosing a merge with texts: every recipe and scale scored by fidelity, the best refined or fitted where that holds up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from plait.adapters.lora import Adapter
from plait.errors import RunError
from plait.fidelity.candidates import METHODS, OWN_MOMENTS, SCALES, Recipe, Tried, groups_of, merged_by, recipes
from plait.fidelity.distil import distil
from plait.fidelity.duration import expected_seconds, in_words
from plait.fidelity.fitting import Fit, best_fit, can_fit, fitted
from plait.fidelity.measure import Fidelity
from plait.fidelity.moments import collect_moments, merged_kinds
from plait.fidelity.panel import Panel
from plait.fidelity.record import Evidence, FidelityRecord
from plait.fidelity.score import fidelities, general_shift
from plait.fidelity.texts import split_off
from plait.fidelity.tokens import require_room
from plait.merging.metric_cut import InputMetric, cut_adapter, input_metric
from plait.progress import OnProgress

# Texts of each adapter in the first round, in which everything is tried; and the share that goes on to the second.
SCREEN, GOES_ON = 32, 8
# Every fourth text is held out when weights are learnt; with fewer texts than this none are learnt.
HELD_OUT, FEWEST = 4, 12
# Beyond the scales that are given: by this factor, so often at most.
STEP, _GROWTH = 2**0.5, 6


@dataclass(frozen=True, slots=True)
class Scored:
    """A merge at one scale and its fidelity.

    Args:
        tried: The merge at scale 1.
        scale: Scale of its delta.
        fidelity: On the texts of the round it reached.
        n: Texts of each adapter in that round, at most.
    """

    tried: Tried
    scale: float
    fidelity: Fidelity
    n: int

    def within(self, max_shift: float | None) -> bool:
        """Whether it moves general text by a limit at most, where there is one."""
        return max_shift is None or (self.fidelity.general_kl or 0.0) <= max_shift

    @property
    def evidence(self) -> Evidence:
        """Its line in the evidence."""
        recipe, fidelity = self.tried.recipe, FidelityRecord.of(self.fidelity)
        return Evidence(
            recipe.label,
            recipe.method,
            recipe.calibrate,
            self.scale,
            recipe.moments,
            self.n,
            fidelity.score,
            fidelity.general_kl,
            tasks=fidelity.tasks,
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen and why.

    Args:
        adapter: The merge, scale and weights folded in.
        recipe, scale: How it was made.
        weights: Module -> what its parts were multiplied by (one per adapter, or one); {} where nothing was refined.
        held_out: "chosen", "refined", "cut" (the better of both at the rank asked for) and "fitted" -> score on the texts held
            out; {} where nothing was learnt.
        scored: Everything that was tried, best first.
        fit: How the merge was fitted front to back; None where it was not.
        unfitted: The choice before a fit was tried; None where none was. It is fitted at another rank by `with_fit`.
        metric: The adapters' own inputs on the texts, in whose metric it is cut to a rank; None where some module has none.
    """

    adapter: Adapter
    recipe: Recipe
    scale: float
    weights: Mapping[str, tuple[float, ...]]
    held_out: Mapping[str, float]
    scored: tuple[Scored, ...]
    fit: Fit | None = None
    unfitted: Choice | None = None
    metric: InputMetric | None = None


def choose(
    panel: Panel,
    adapters: Sequence[Adapter],
    *,
    methods: Sequence[str] = METHODS,
    scales: Sequence[float] = SCALES,
    refine: int = 100,
    fit: bool = True,
    repair: int = 0,
    rank: int | None = None,
    max_shift: float | None = None,
    seed: int = 0,
    base: str | None = None,
    on_progress: OnProgress = lambda _: None,
) -> Choice:
    """Choose the merge that stays closest to all adapters on their own texts.

    Args:
        panel: Base, adapters and texts.
        adapters: What is merged.
        methods: Which methods are tried.
        scales: Which scales.
        refine: Steps in which the winner's weights per adapter and module are learnt; 0 for none. They are kept where
            they are closer on the quarter of the texts that was held out.
        fit: Whether the winner is also fitted front to back; what is closest on the quarter held out stays.
        repair: Steps of a repair that comes after it, for the time that is told.
        rank: Rank of a fitted merge, which is cut in the metric of its inputs; that of the sum by default.
        max_shift: Most KL to the base on the panel's general texts, in nats: whatever moves the model further is left out.
        seed: Seed of the order of the texts.
        base: Base id of the result where the adapters name one base by different names.
        on_progress: Called with what is being done.

    Raises:
        InputError: A text beyond the base's table of positions; nothing has been computed then.
        RunError: No candidate within `max_shift`.

    Cost: methods x 2 x scales passes over at most 32 texts of each adapter (and as many more as the grid has to grow by), an eighth
        of them over all; `refine` steps; three fits (`featcal`), two of them on three quarters of the texts.
    """
    require_room(panel)
    on_progress("moments of the texts")
    moments = collect_moments(panel)
    on_progress("merging by every method")
    tried = [Tried(r, merged_by(r, adapters, moments, base=base)) for r in recipes(merged_kinds(moments), methods)]
    enough = min(len(rows) for rows in panel.texts.values()) >= FEWEST
    fits = (3 - 2 / HELD_OUT) * (fit and enough and can_fit(panel))  # two of them on three quarters of the texts
    merges = len(tried) * len(scales)
    seconds = expected_seconds(
        panel, _screen(panel, max_shift), merges, merges // GOES_ON, refine=refine * enough + repair, fits=fits
    )
    on_progress(f"about {in_words(seconds)} from here{', if the repair takes all its steps' if repair else ''}")
    scored = tournament(panel, tried, scales, on_progress, max_shift)
    best = scored[0]
    if not best.within(max_shift):
        raise RunError(
            f"no candidate moves general text by {max_shift:g} nats or less; the least was {best.fidelity.general_kl:.3g}",
            hint="a larger --max-shift, or serve the adapters separately",
        )
    adapter = scaled(best.tried.adapter, best.scale)
    weights: Mapping[str, tuple[float, ...]] = {}
    held_out: dict[str, float] = {}
    if refine and enough:
        on_progress(f"weights per adapter and module, {refine} steps")
        refined, learnt, held_out = refined_weights(panel, adapters, best, refine, seed)
        if held_out["refined"] > held_out["chosen"] and within(panel, refined, max_shift):
            adapter, weights = refined, learnt
    metric, _ = input_metric(adapters, [1.0] * len(adapters), moments[OWN_MOMENTS], list(adapter.modules))
    choice = Choice(adapter, best.tried.recipe, best.scale, weights, held_out, tuple(scored), metric=metric)
    if not (fit and enough and can_fit(panel)):
        return choice
    return with_fit(choice, panel, adapters, rank=rank, max_shift=max_shift, base=base, on_progress=on_progress)


def with_fit(
    choice: Choice,
    panel: Panel,
    adapters: Sequence[Adapter],
    *,
    rank: int | None = None,
    max_shift: float | None = None,
    base: str | None = None,
    on_progress: OnProgress = lambda _: None,
) -> Choice:
    """Fit a choice, made of the same texts without a fit, front to back at a rank; keep it where held-out texts say that it is closer."""
    start = scaled(choice.scored[0].tried.adapter, choice.scale)
    held_out = dict(choice.held_out) or {"chosen": _on_rest(panel, start)}
    before = max(held_out.values())
    if rank is not None and rank < choice.adapter.rank:
        before = held_out["cut"] = _on_rest(panel, cut_adapter(choice.adapter, rank, choice.metric)[0])
    settings, score = best_fit(
        panel, adapters, start, HELD_OUT, rank=rank, max_shift=max_shift, on_progress=on_progress
    )
    tried = replace(choice, held_out={**held_out, "fitted": score}, unfitted=choice)
    if score <= before:
        return tried
    on_progress("fitting it to all texts")
    merge = fitted(panel, adapters, start, settings, rank=rank, base=base)
    return replace(tried, adapter=merge, weights={}, fit=settings) if within(panel, merge, max_shift) else tried


def within(panel: Panel, merge: Adapter, max_shift: float | None) -> bool:
    """Whether a merge moves the base's answers to the panel's general texts by a limit at most; any does without one."""
    return max_shift is None or float(general_shift(panel, [(merge, 1.0)])[0]) <= max_shift


def _on_rest(panel: Panel, merge: Adapter) -> float:
    rest = split_off(panel.texts, HELD_OUT)[1]
    return fidelities(panel.with_texts(rest, general=False), [(merge, 1.0)])[0].score


def tournament(
    panel: Panel,
    tried: Sequence[Tried],
    scales: Sequence[float],
    on_progress: OnProgress = lambda _: None,
    max_shift: float | None = None,
) -> list[Scored]:
    """Score all merges at all scales on a part of the texts, the best of them on all; best first, later rounds before earlier ones.

    A merge whose best scale lies on the edge of those it was tried at is tried one step further, until its best lies within.
    Those that move general text further than `max_shift` come last, the least first.
    """

    def place(one: Scored) -> tuple[bool, float]:
        over = not one.within(max_shift)
        return over, (one.fidelity.general_kl or 0.0) if over else -one.fidelity.score

    longest, screen = max(len(rows) for rows in panel.texts.values()), _screen(panel, max_shift)
    entries = [(t, s) for t in tried for s in scales]
    first: list[Scored] = []
    for _ in range(_GROWTH + 1):
        on_progress(f"{len(entries)} merges, by fidelity")
        first += _scored(screen, entries, min(SCREEN, longest), on_progress)
        if not (entries := _beyond(first, place)) or len(scales) < 2:
            break
    first.sort(key=place)
    if longest <= SCREEN:
        return first
    going = first[: max(2, len(first) // GOES_ON)]
    on_progress(f"the best {len(going)} of them, on all texts")
    last = _scored(panel, [(s.tried, s.scale) for s in going], longest, on_progress)
    return sorted(last, key=place) + first[len(going) :]


def _screen(panel: Panel, max_shift: float | None) -> Panel:
    """The texts of the first round; the general ones too where there is no second, or they decide."""
    few = {t: rows[:SCREEN] for t, rows in panel.texts.items()}
    longest = max(len(rows) for rows in panel.texts.values())
    return panel.with_texts(few, general=longest <= SCREEN or max_shift is not None)


def _beyond(scored: Sequence[Scored], place: Callable[[Scored], tuple[bool, float]]) -> list[tuple[Tried, float]]:
    """For every merge whose best scale is the smallest or largest it was tried at: the merge, and the scale a step further."""
    by_merge: dict[int, list[Scored]] = {}
    for one in scored:
        by_merge.setdefault(id(one.tried), []).append(one)
    further = []
    for ones in by_merge.values():
        at = min(ones, key=place).scale
        tried = [r.scale for r in ones]
        if at in (min(tried), max(tried)):
            further.append((ones[0].tried, at * STEP if at == max(tried) else at / STEP))
    return further


def _scored(panel: Panel, entries: Sequence[tuple[Tried, float]], n: int, on_progress: OnProgress) -> list[Scored]:
    scores = fidelities(panel, [(t.adapter, s) for t, s in entries], on_progress)
    return [Scored(t, s, f, n) for (t, s), f in zip(entries, scores, strict=True)]


def refined_weights(
    panel: Panel,
    adapters: Sequence[Adapter],
    best: Scored,
    steps: int,
    seed: int,
) -> tuple[Adapter, Mapping[str, tuple[float, ...]], dict[str, float]]:
    """Weights per adapter and module, learnt on three quarters of the texts; scores of both on the fourth."""
    most, rest = split_off(panel.texts, HELD_OUT)
    start = scaled(best.tried.adapter, best.scale)
    learnt = distil(
        panel.with_texts(most, general=False),
        start,
        learns="weights",
        groups=groups_of(best.tried, adapters),
        steps=steps,
        seed=seed,
    )
    before, after = fidelities(panel.with_texts(rest, general=False), [(start, 1.0), (learnt.adapter, 1.0)])
    return learnt.adapter, learnt.weights, {"chosen": before.score, "refined": after.score}


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """Multiply every delta of an adapter."""
    if scale == 1.0:
        return adapter
    return replace(adapter, modules={m: replace(f, scaling=f.scaling * scale) for m, f in adapter.modules.items()})
