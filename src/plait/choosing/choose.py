"""Choosing a merge with texts: every recipe and scale scored by fidelity, the best refined or fitted where that holds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.choosing.candidates import METHODS, SCALES, Recipe, Tried, groups_of, merged_by, recipes
from plait.choosing.proxy import best_scale, terms
from plait.choosing.tournament import Scored, tournament
from plait.errors import RunError
from plait.fidelity.moments import OWN_MOMENTS, collect_moments, merged_kinds
from plait.fidelity.panel import Panel
from plait.fidelity.score import fidelities, general_shift
from plait.fidelity.texts import FEWEST, HELD_OUT, split_off
from plait.fidelity.tokens import require_room
from plait.learning.checkpoint_files import Piece, settled
from plait.learning.checkpoint_reach import FIT, WEIGHING, WEIGHTS
from plait.learning.checkpoints import NOTHING_KEPT, Checkpoints
from plait.learning.distil import Keeping, distil
from plait.learning.fitting import Fit, best_fit, can_fit, fitted
from plait.learning.learning_state import KeptLearning
from plait.merging.metric_cut import InputMetric, cut_adapter, input_metric
from plait.progress import OnProgress

LEARNT_WEIGHTS, THE_FIT = "learnt weights", "the fit"  # what a limit may leave out, in the record


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
        beyond: What was closer to the adapters and is left out, as it moves general text beyond the limit: "learnt weights", "the fit".
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
    beyond: tuple[str, ...] = ()


def choose(
    panel: Panel,
    adapters: Sequence[Adapter],
    *,
    methods: Sequence[str] = METHODS,
    scales: Sequence[float] = SCALES,
    refine: int = 100,
    fit: bool = True,
    rank: int | None = None,
    max_shift: float | None = None,
    seed: int = 0,
    base: str | None = None,
    on_progress: OnProgress = lambda _: None,
    checkpoints: Checkpoints = NOTHING_KEPT,
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
        rank: Rank of a fitted merge, which is cut in the metric of its inputs; that of the sum by default.
        max_shift: Most KL to the base on the panel's general texts, in nats: whatever moves the model further is left out.
        seed: Seed of the order of the texts.
        base: Base id of the result where the adapters name one base by different names.
        on_progress: Called with what is being done.
        checkpoints: Where it goes on from, and is kept; moments and merges are computed again.

    Raises:
        InputError: A text beyond the base's table of positions; nothing has been computed then.
        RunError: No candidate within `max_shift`.

    Cost: the tournament's passes (`plait.choosing.tournament`); `refine` steps; three fits (`featcal`), two of them on three quarters
        of the texts.
    """
    require_room(panel)
    on_progress("moments of the texts")
    moments = collect_moments(panel)
    on_progress("merging by every method")
    made = [(r, merged_by(r, adapters, moments, base=base)) for r in recipes(merged_kinds(moments), methods)]
    tried = [Tried(recipe, merge, best_scale(terms(merge, adapters))) for recipe, merge in made]
    enough = can_learn(panel)
    scored = tournament(panel, tried, scales, on_progress, max_shift, checkpoints)
    best = scored[0]
    if not best.within(max_shift):
        raise RunError(
            f"no candidate moves general text by {max_shift:g} nats or less; the least was {best.fidelity.general_kl:.3g}",
            hint="a larger --max-shift, or serve the adapters separately",
        )
    adapter = scaled(best.tried.adapter, best.scale)
    weights: Mapping[str, tuple[float, ...]] = {}
    held_out: dict[str, float] = {}
    beyond: tuple[str, ...] = ()
    if refine and enough:
        refined, learnt, held_out = _weights(panel, adapters, best, refine, seed, checkpoints, on_progress)
        if held_out["refined"] > held_out["chosen"]:
            if within(panel, refined, max_shift):
                adapter, weights = refined, learnt
            else:  # no fit has to be closer than what may not be taken
                beyond, held_out = (LEARNT_WEIGHTS,), {"chosen": held_out["chosen"]}
    metric, _ = input_metric(adapters, [1.0] * len(adapters), moments[OWN_MOMENTS], list(adapter.modules))
    choice = Choice(
        adapter, best.tried.recipe, best.scale, weights, held_out, tuple(scored), metric=metric, beyond=beyond
    )
    if not (fit and enough and can_fit(panel)):
        return choice
    return with_fit(
        choice,
        panel,
        adapters,
        rank=rank,
        max_shift=max_shift,
        base=base,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )


def can_learn(panel: Panel) -> bool:
    """Whether every adapter has texts enough to hold some out."""
    return min(len(rows) for rows in panel.texts.values()) >= FEWEST


def with_fit(
    choice: Choice,
    panel: Panel,
    adapters: Sequence[Adapter],
    *,
    rank: int | None = None,
    max_shift: float | None = None,
    base: str | None = None,
    on_progress: OnProgress = lambda _: None,
    checkpoints: Checkpoints = NOTHING_KEPT,
) -> Choice:
    """Fit a choice, made of the same texts without a fit, front to back at a rank; keep it where held-out texts say that it is closer."""
    start = scaled(choice.scored[0].tried.adapter, choice.scale)
    held_out = dict(choice.held_out) or {"chosen": _on_rest(panel, start)}
    before = max(held_out.values())
    if rank is not None and rank < choice.adapter.rank:
        before = held_out["cut"] = _on_rest(panel, cut_adapter(choice.adapter, rank, choice.metric)[0])
    best = _fits(panel, adapters, start, rank, max_shift, checkpoints, on_progress)
    if best is None:
        return replace(choice, held_out=held_out, unfitted=choice, beyond=(*choice.beyond, THE_FIT))
    settings, score = best
    tried = replace(choice, held_out={**held_out, "fitted": score}, unfitted=choice)
    if score <= before:
        return tried
    on_progress("fitting it to all texts")
    merge = fitted(panel, adapters, start, settings, rank=rank, base=base)
    if not within(panel, merge, max_shift):
        return replace(tried, beyond=(*choice.beyond, THE_FIT))
    return replace(tried, adapter=merge, weights={}, fit=settings)


def _weights(
    panel: Panel,
    adapters: Sequence[Adapter],
    best: Scored,
    steps: int,
    seed: int,
    checkpoints: Checkpoints,
    on_progress: OnProgress,
) -> tuple[Adapter, Mapping[str, tuple[float, ...]], dict[str, float]]:
    """`refined_weights`, or what it gave before."""
    if (piece := checkpoints.piece(WEIGHTS)) is not None:
        weights = {m: tuple(w) for m, w in piece.values["weights"].items()}
        return piece.adapters["refined"], weights, dict(piece.values["held_out"])
    on_progress(f"weights per adapter and module, {plural(steps, 'step')}")
    keeping = KeptLearning(checkpoints, WEIGHING)
    refined, learnt, held_out = refined_weights(panel, adapters, best, steps, seed, keeping)
    values = {"weights": dict(learnt), "held_out": held_out}
    checkpoints.keep(WEIGHTS, lambda: Piece(values, adapters={"refined": refined}), instead_of=(WEIGHING,))
    return refined, learnt, held_out


def _fits(
    panel: Panel,
    adapters: Sequence[Adapter],
    start: Adapter,
    rank: int | None,
    max_shift: float | None,
    checkpoints: Checkpoints,
    on_progress: OnProgress,
) -> tuple[Fit, float] | None:
    """`best_fit`, or what it gave before."""
    if (piece := checkpoints.piece(FIT)) is not None:
        return (Fit(**piece.values["fit"]), piece.values["score"]) if piece.values else None
    best = best_fit(panel, adapters, start, HELD_OUT, rank=rank, max_shift=max_shift, on_progress=on_progress)
    checkpoints.keep(FIT, lambda: Piece({"fit": asdict(best[0]), "score": best[1]} if best else {}))
    return best


def within(panel: Panel, merge: Adapter, max_shift: float | None) -> bool:
    """Whether a merge moves the base's answers to the panel's general texts by a limit at most; any does without one."""
    return max_shift is None or float(general_shift(panel, [(merge, 1.0)])[0]) <= max_shift


def _on_rest(panel: Panel, merge: Adapter) -> float:
    rest = split_off(panel.texts, HELD_OUT)[1]
    return fidelities(panel.with_texts(rest, general=False), [(merge, 1.0)])[0].score


def refined_weights(
    panel: Panel,
    adapters: Sequence[Adapter],
    best: Scored,
    steps: int,
    seed: int,
    keeping: Keeping | None = None,
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
        keeping=keeping,
    )
    refined = settled(learnt.adapter)
    before, after = fidelities(panel.with_texts(rest, general=False), [(start, 1.0), (refined, 1.0)])
    return refined, learnt.weights, {"chosen": before.score, "refined": after.score}


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """Multiply every delta of an adapter."""
    if scale == 1.0:
        return adapter
    return replace(adapter, modules={m: replace(f, scaling=f.scaling * scale) for m, f in adapter.modules.items()})
