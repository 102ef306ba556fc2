"""How strongly a merge is applied where nobody says: a scale by method and number of adapters, or from second moments.

Several updates that are added up at scale 1 move the model several times too far; how far is right depends on the method and on
how many there are, and hardly on the tasks. The rule's two numbers for each method were fitted once, by labels, on the archived
studies and on merges of 2 to 11 adapters (benchmarks/scales.py makes the table in docs/results/scales.md); they are constants,
so that a user needs no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plait.adapters.lora import CONSTRAINT, Adapter, LoraFactors
from plait.merging.spec import MergeSpec

DEFAULT_METHOD = "tsv"
_OF_WRITERS, _WRITES = "regmean", "CAUSAL_LM"  # where there are statistics, for adapters of such a task type
_PLAIN_WRITERS = "iso_c"  # where there are none, for the same kind
# Of so many at least: it was measured ahead of TSV-M on nine and sixteen, level on three, and on two of MPNet it is behind.
FEWEST_WRITERS = 8
_ALONE = "keeps most of what needs the adapters alone"
_PENALISED = "penalised"  # `plait.training.settings.CONSTRAINTS`
EXACT_SUMS = ("linear", "cat")  # weighted sums that stay what their weights say
SUMS = ("task_arithmetic", "svd", "dare_linear")  # sums too, of which the rule is for weights of 1
_PICO = "pico"
WEIGHTS_SAY = "the weights say how much of each is added"
OF_STATISTICS = "from their statistics"  # how the reason of a scale ends that moments chose

# (method, calibration) -> c and p of the scale c * T ** p for T adapters.
RULES: Mapping[tuple[str, str | None], tuple[float, float]] = {
    ("task_arithmetic", None): (1.1, -0.5),
    ("svd", None): (1.1, -0.5),  # the same sum, cut
    ("dare_linear", None): (1.1, -0.5),
    ("ties", None): (1.5, -0.2),
    ("dare_ties", None): (1.0, 0.0),
    ("knots", None): (0.75, 0.3),
    ("core_space", None): (0.75, 0.3),
    ("tsv", None): (0.7, 0.0),
    ("iso_c", None): (2.2, -0.2),
    ("regmean", None): (0.8, 0.4),
    ("least_squares", None): (0.58, 0.5),
    # These two of one seed only: adapters of MPNet, two, four and eight together.
    ("ssr", None): (1.05, 0.3),
    ("swudi", None): (0.8, 0.0),
    ("task_arithmetic", _PICO): (1.0, 0.2),
    ("tsv", _PICO): (1.05, 0.4),
    ("regmean", _PICO): (1.05, 0.4),
}
BY_RULE = ("iso_c",)  # for this the rule was nearer to the best scale than what moments say
# How much further than its own adapter a merge moves each task's outputs where it serves the tasks best; and for methods for
# which that was another number. RegMean's best scale is about 1.9 on encoders and 1.2 on a decoder of 1.5 B, for as many adapters: no rule
# by their number serves both, and this does (docs/results/scales.md).
REACH = 1.1
REACHES: Mapping[str, float] = {
    "regmean": 1.3,
    "mats": 1.3,
}  # mats: RegMean's, whose least squares it shares; one seed agrees


@dataclass(frozen=True, slots=True)
class Scale:
    """A scale and where it comes from.

    Args:
        value: Multiplies the merged update.
        reason: One phrase, such as "0.7 for tsv, whatever the number of adapters".
    """

    value: float
    reason: str


def default_is_sum(count: int, *, weighted: bool) -> bool:
    """Whether it is the sum where nobody names a method, which needs no look at the adapters.

    Args:
        count: How many adapters.
        weighted: Whether weights were given, which say how much of each is added.
    """
    return count < 2 or weighted


def default_method(
    adapters: Sequence[Adapter], spec: MergeSpec, statistics: Mapping[str, Any] | None = None, *, cuts: bool = False
) -> tuple[str, str]:
    """Name the method where nobody does, and why.

    RegMean where every adapter is of a language model and has second moments of all that it changes: in the tables of decoders it keeps
    more than TSV-M of all starts but four, which keep at most 3 points less; of PEFT's default at least 15 more. On encoders neither is
    ahead throughout (docs/study/defaults.md).

    Without statistics Iso-C where there are `FEWEST_WRITERS` or more, every one is of a language model, all change the same modules, and
    none says that plait trained it with a penalty: of plain ones it keeps more than TSV-M wherever a decoder wrote its answers
    (docs/study/defaults.md). A cut to a rank, a calibration or options leave TSV-M: Iso-C's directions are all equally strong, so that none
    is the last, and has neither a rule for its scale after a calibration nor options. TSV-M everywhere else, the sum for one adapter and
    where weights say how much of each.

    Args:
        adapters: What is merged.
        spec: How it is merged; its method is not looked at.
        statistics: Adapter -> its statistics.
        cuts: Whether it is cut to ranks that the spec does not say.

    Returns:
        The method, and a phrase; "" for a sum, of which the scale's reason says all.
    """
    if default_is_sum(len(adapters), weighted=spec.is_weighted):
        return SUMS[0], ""
    writers = [a for a in adapters if a.task_type == _WRITES]
    lacking = [(a.name, m) for a in adapters if (m := _uncovered((statistics or {}).get(a.name), a)) is not None]
    if len(writers) == len(adapters) and not lacking:
        return _OF_WRITERS, "first on language models where every adapter has statistics"
    method, why = _by_adapters_alone(adapters, writers, spec, cuts=cuts)
    if not statistics or len(writers) < len(adapters):
        return method, why
    name, module = lacking[0]
    where = f" of {module}" if hasattr(statistics.get(name), "moments_for") else ""
    return method, why + f" ({_OF_WRITERS} is for statistics of all: {name} has none{where})"


def _by_adapters_alone(
    adapters: Sequence[Adapter], writers: Sequence[Adapter], spec: MergeSpec, *, cuts: bool
) -> tuple[str, str]:
    """The method that reads no statistics, and why."""
    if not writers:
        return DEFAULT_METHOD, _ALONE
    penalised = [a.name for a in adapters if a.source.get(CONSTRAINT) == _PENALISED]
    if len(writers) < len(adapters):
        other = next(a.name for a in adapters if a.task_type != _WRITES)
        but = f"is for language models, and {other} does not say that it is of one"
    elif len(adapters) < FEWEST_WRITERS:
        but = f"is for {FEWEST_WRITERS} adapters of language models or more"
    elif penalised:
        but = f"keeps less of adapters trained with the penalty, as {penalised[0]} was"
    elif len({frozenset(a.modules) for a in adapters}) > 1:
        but = "was measured where all adapters change the same modules"
    elif spec.rank is not None or cuts:
        but = "makes all directions equally strong, and a cut needs weak ones"
    elif spec.calibrate is not None:
        but = f"has no rule for its scale with {spec.calibrate}"
    elif spec.options:
        but = "has no options"
    else:
        return _PLAIN_WRITERS, "keeps most of plain adapters of language models where there is nothing but them"
    return DEFAULT_METHOD, f"{_ALONE} ({_PLAIN_WRITERS} {but})"


def _uncovered(statistics: Any, adapter: Adapter) -> str | None:
    """The first module that the adapter changes and that they hold no second moments of; None where there is no such module."""
    known = hasattr(statistics, "moments_for")
    return next((m for m in adapter.modules if not known or statistics.moments_for(m) is None), None)


def asks_moments(method: str, calibration: str | None) -> bool:
    """Whether a scale that nobody gives is read off second moments, where there are any."""
    return calibration is not None or method not in (*EXACT_SUMS, *BY_RULE)


def reach_of(method: str, calibration: str | None) -> float:
    """Give the reach of a method, with a calibration or without."""
    return REACH if calibration is not None else REACHES.get(method, REACH)


def scale_by_rule(method: str, calibration: str | None, weights: Sequence[float]) -> Scale:
    """Choose a scale from the method and the number of adapters alone.

    Args:
        method: A name in `merge_methods()`.
        calibration: "pico", "svc" or None.
        weights: One per adapter, as the merge has them.

    Returns:
        c T^p for T adapters that count, three digits; 1 for one adapter, for sums whose weights were given (they say how much of
        each is added), for exact sums, and for methods that nobody has measured.
    """
    count = sum(w != 0.0 for w in weights)
    if count == 0:
        return Scale(1.0, "all weights are 0, and nothing is left")
    if count == 1:
        whole = 1.0 in weights
        return Scale(1.0, "one adapter stays as it is" if whole else "one adapter, as much of it as its weight says")
    if method in SUMS and any(w not in (0.0, 1.0) for w in weights):
        return Scale(1.0, WEIGHTS_SAY)
    if method in EXACT_SUMS and calibration is None:
        return Scale(1.0, f"{method} is an exact sum")
    if (method, calibration) not in RULES:
        return Scale(1.0, f"no rule was measured for {method}{f' with {calibration}' if calibration else ''}")
    c, p = RULES[method, calibration]
    if not p:
        return Scale(c, f"the rule for {method}, the same for any number of adapters")
    return Scale(float(f"{c * count**p:.3g}"), f"the rule for {count} adapters by {method}: {c:g} * {count} ** {p:g}")


def scale_by_moments(
    adapters: Sequence[Adapter],
    merged: Mapping[str, LoraFactors],
    statistics: Mapping[str, Any],
    reach: float = REACH,
    *,
    two_sided: bool = False,
) -> Scale | None:
    """Choose the scale at which the merge moves every task's outputs about as far as the task's own adapter does.

    Formula: s = reach sqrt(T / sum_t c_t / a_t) with a_t = sum over modules of tr(D_t m_t D_t^T) / tr(W0 m_t W0^T) and c_t
    the same of the merge D: the mean square, over tasks, of the merge's output shift in units of the own one becomes reach^2.
    The reach was fitted by labels, one number for all methods but RegMean.

    Args:
        adapters: What was merged.
        merged: Module -> its merge at scale 1.
        statistics: Adapter -> its second moments (`Statistics`).
        reach: How much further than its own adapter the merge moves a task's outputs; see `reach_of`.
        two_sided: Count shifts by what they do to predictions, tr(G_t D m_t D^T) with the output gradients' second moment G_t and no
            denominator: of a merge that leaves free what no prediction depends on.

    Returns:
        The scale; None where an adapter has no statistics of any of its modules, or changes nothing on them.

    Cost: two small products a module and adapter, and one (d, d) product with the merge's A.
    """
    ratios = []
    for adapter in adapters:
        own = whole = 0.0
        stats = statistics.get(adapter.name)
        if stats is None or not hasattr(stats, "moments_for"):
            return None
        for module, factors in adapter.modules.items():
            moments = stats.moments_for(module)
            energy = stats.modules[stats.relative(module)].output_energy if moments is not None else 0.0
            outputs = stats.output_gradients_for(module) if two_sided and moments is not None else None
            if moments is not None and outputs is not None:
                energy = float(moments.count * outputs.count)
            if moments is None or not energy > 0 or module not in merged:
                continue
            sides = moments.project, outputs and outputs.project
            own += _shift(factors, *sides) / energy
            whole += _shift(merged[module], *sides) / energy
        if not own > 0:
            return None
        ratios.append(whole / own)
    mean = sum(ratios) / len(ratios)
    if not mean > 0:
        return None
    value = float(f"{reach * mean**-0.5:.3g}")
    return Scale(
        value,
        f"{reach:g} times what moves each task's {'predictions' if two_sided else 'outputs'} as far as its own adapter does, "
        f"{OF_STATISTICS}",
    )


def _shift(factors: LoraFactors, inputs: Callable[[Any], Any], outputs: Callable[[Any], Any] | None) -> float:
    """tr(G D S D^T) of one module, from the factors; G is the identity where there is no projection of outputs."""
    folded = factors.folded()
    inner = inputs(folded.A).double()  # A S A^T
    B = folded.B.double()
    outer = B.T @ B if outputs is None else outputs(B.T)
    return float((outer * inner).sum())
