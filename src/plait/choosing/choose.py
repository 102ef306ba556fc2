"""Choosing a merge with texts: every recipe and scale scored by fidelity, the best refined or fitted where that holds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.choosing.auto_settings import AutoSettings
from plait.choosing.candidates import Recipe, Tried, groups_of, merged_by, recipes
from plait.choosing.proxy import best_scale, terms
from plait.choosing.tournament import Scored, tournament
from plait.errors import RunError
from plait.fidelity.moments import OWN_MOMENTS, collect_moments, merged_kinds
from plait.fidelity.panel import Panel
from plait.fidelity.score import fidelities, general_shift
from plait.fidelity.texts import FEWEST, split_off
from plait.fidelity.tokens import require_room
from plait.learning.checkpoint_files import Piece, settled
from plait.learning.checkpoint_reach import FIT, WEIGHING, WEIGHTS
from plait.learning.checkpoints import NOTHING_KEPT, Checkpoints
from plait.learning.distil import Keeping, distil
from plait.learning.fitting import Fit, best_fit, can_fit, fitted
from plait.learning.learning_state import KeptLearning
from plait.merging.metric_cut import InputMetric, cut_adapter, input_metric
from plait.progress import OnProgress
from plait.statistics import Statistics

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
    settings: AutoSettings | None = None,
    *,
    base: str | None = None,
    on_progress: OnProgress = lambda _: None,
    checkpoints: Checkpoints = NOTHING_KEPT,
) -> Choice:
    """Choose the merge that stays closest to all adapters on their own texts.

    Args:
        panel: Base, adapters and texts.
        adapters: What is merged.
        settings: Methods and scales that are tried, steps in which the winner's weights are learnt, whether it is fitted and at
            which rank, the limit on general text, and the seed; the rest is of what comes after a choice.
        base: Base id of the result where the adapters name one base by different names.
        on_progress: Called with what is being done.
        checkpoints: Where it goes on from, and is kept; moments and merges are computed again.

    Raises:
        InputError: A text beyond the base's table of positions; nothing has been computed then.
        RunError: No candidate within `max_shift`.

    Cost: the tournament's passes (`plait.choosing.tournament`); `refine` steps; three fits (`featcal`), two of them on three quarters
        of the texts.
    """
    return _Choosing(panel, adapters, settings or AutoSettings(), base, on_progress, checkpoints).choice()


def with_fit(
    choice: Choice,
    panel: Panel,
    adapters: Sequence[Adapter],
    settings: AutoSettings,
    *,
    base: str | None = None,
    on_progress: OnProgress = lambda _: None,
) -> Choice:
    """Fit a choice, made of the same texts without a fit, front to back at the rank asked for; see `choose`.

    Returns:
        The fitted merge where held-out texts say that it is closer, else the choice as it is, with what was seen there.
    """
    return _Choosing(panel, adapters, settings, base, on_progress, NOTHING_KEPT).with_fit(choice)


def can_learn(panel: Panel) -> bool:
    """Whether every adapter has texts enough to hold some out."""
    return min(len(rows) for rows in panel.texts.values()) >= FEWEST


@dataclass(frozen=True, slots=True)
class _Choosing:
    """A choice while it is made: of what, how, and where it says and keeps what is done."""

    panel: Panel
    adapters: Sequence[Adapter]
    settings: AutoSettings
    base: str | None
    on_progress: OnProgress
    checkpoints: Checkpoints

    def choice(self) -> Choice:
        """Score every merge, learn the best one's weights, and fit it, each step kept where held-out texts say so."""
        require_room(self.panel)
        self.on_progress("moments of the texts")
        moments = collect_moments(self.panel)
        choice = self._weighed(self._scored(moments))
        modules = list(choice.adapter.modules)
        metric, _ = input_metric(self.adapters, [1.0] * len(self.adapters), moments[OWN_MOMENTS], modules)
        choice = replace(choice, metric=metric)
        fits = self.settings.fit and can_learn(self.panel) and can_fit(self.panel)
        return self.with_fit(choice) if fits else choice

    def with_fit(self, choice: Choice) -> Choice:
        """See `with_fit`."""
        rank = self.settings.rank
        start = scaled(choice.scored[0].tried.adapter, choice.scale)
        held_out = dict(choice.held_out) or {"chosen": self._on_rest(start)}
        before = max(held_out.values())
        if rank is not None and rank < choice.adapter.rank:
            before = held_out["cut"] = self._on_rest(cut_adapter(choice.adapter, rank, choice.metric)[0])
        best = self._best_fit(start)
        if best is None:
            return replace(choice, held_out=held_out, unfitted=choice, beyond=(*choice.beyond, THE_FIT))
        fit, score = best
        tried = replace(choice, held_out={**held_out, "fitted": score}, unfitted=choice)
        if score <= before:
            return tried
        self.on_progress("fitting it to all texts")
        merge = fitted(self.panel, self.adapters, start, fit, rank=rank, base=self.base)
        if not self._within(merge):
            return replace(tried, beyond=(*choice.beyond, THE_FIT))
        return replace(tried, adapter=merge, weights={}, fit=fit)

    def _scored(self, moments: Mapping[str, Mapping[str, Statistics]]) -> Sequence[Scored]:
        """Merge by every method, and let the merges meet at their scales; the best first."""
        self.on_progress("merging by every method")
        known = recipes(merged_kinds(moments), self.settings.methods)
        made = [(r, merged_by(r, self.adapters, moments, base=self.base)) for r in known]
        tried = [Tried(recipe, merge, best_scale(terms(merge, self.adapters))) for recipe, merge in made]
        limit = self.settings.max_shift
        scored = tournament(self.panel, tried, self.settings.scales, self.on_progress, limit, self.checkpoints)
        if not scored[0].within(limit):
            raise RunError(
                f"no candidate moves general text by {limit:g} nats or less; "
                f"the least was {scored[0].fidelity.general_kl:.3g}",
                hint="a larger --max-shift, or serve the adapters separately",
            )
        return scored

    def _weighed(self, scored: Sequence[Scored]) -> Choice:
        """Take the best merge, with weights that are learnt where they bring it closer."""
        best = scored[0]
        choice = Choice(
            scaled(best.tried.adapter, best.scale), best.tried.recipe, best.scale, {}, {}, tuple(scored)
        )  # fmt: skip
        if not (self.settings.refine and can_learn(self.panel)):
            return choice
        refined, learnt, held_out = self._weights(best)
        if held_out["refined"] <= held_out["chosen"]:
            return replace(choice, held_out=held_out)
        if self._within(refined):
            return replace(choice, adapter=refined, weights=learnt, held_out=held_out)
        # No fit has to be closer than what may not be taken.
        return replace(choice, held_out={"chosen": held_out["chosen"]}, beyond=(LEARNT_WEIGHTS,))

    def _weights(self, best: Scored) -> tuple[Adapter, Mapping[str, tuple[float, ...]], dict[str, float]]:
        """`refined_weights`, or what it gave before."""
        if (piece := self.checkpoints.piece(WEIGHTS)) is not None:
            weights = {m: tuple(w) for m, w in piece.values["weights"].items()}
            return piece.adapters["refined"], weights, dict(piece.values["held_out"])
        steps, seed = self.settings.refine, self.settings.seed
        self.on_progress(f"weights per adapter and module, {plural(steps, 'step')}")
        keeping = KeptLearning(self.checkpoints, WEIGHING)
        refined, learnt, held_out = refined_weights(self.panel, self.adapters, best, steps, seed, keeping)
        values = {"weights": dict(learnt), "held_out": held_out}
        self.checkpoints.keep(WEIGHTS, lambda: Piece(values, adapters={"refined": refined}), instead_of=(WEIGHING,))
        return refined, learnt, held_out

    def _best_fit(self, start: Adapter) -> tuple[Fit, float] | None:
        """`best_fit`, or what it gave before."""
        if (piece := self.checkpoints.piece(FIT)) is not None:
            return (Fit(**piece.values["fit"]), piece.values["score"]) if piece.values else None
        settings = self.settings
        best = best_fit(
            self.panel, self.adapters, start, rank=settings.rank, max_shift=settings.max_shift, on_progress=self.on_progress
        )  # fmt: skip
        self.checkpoints.keep(FIT, lambda: Piece({"fit": asdict(best[0]), "score": best[1]} if best else {}))
        return best

    def _within(self, merge: Adapter) -> bool:
        return within(self.panel, merge, self.settings.max_shift)

    def _on_rest(self, merge: Adapter) -> float:
        """Score a merge on the texts that are held out."""
        rest = split_off(self.panel.texts)[1]
        return fidelities(self.panel.with_texts(rest, general=False), [(merge, 1.0)])[0].score


def within(panel: Panel, merge: Adapter, max_shift: float | None) -> bool:
    """Whether a merge moves the base's answers to the panel's general texts by a limit at most; any does without one."""
    return max_shift is None or float(general_shift(panel, [(merge, 1.0)])[0]) <= max_shift


def refined_weights(
    panel: Panel,
    adapters: Sequence[Adapter],
    best: Scored,
    steps: int,
    seed: int,
    keeping: Keeping | None = None,
) -> tuple[Adapter, Mapping[str, tuple[float, ...]], dict[str, float]]:
    """Weights per adapter and module, learnt on three quarters of the texts; scores of both on the fourth."""
    most, rest = split_off(panel.texts)
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
