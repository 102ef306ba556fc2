"""Fidelity: what a merged model keeps of each adapter's predictions. Plain arithmetic on outputs; no model, no labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
# The least that the base must differ from an adapter for a ratio to it to mean anything: a KL of 1e-4 nats.
SMALLEST_BASE_KL = 1e-4
# Less room above chance than this is none: both answer everything alike, but for the rounding of their shares.
NO_ROOM_BELOW = 1e-9


@dataclass(frozen=True, slots=True)
class TaskFidelity:
    """One adapter's predictions on its own texts beside those of a merge, and of the bare base for comparison.

    Args:
        task: Name of the task whose texts and head were used.
        kl: Mean KL(adapter || merged) in nats, of class or next-token distributions; for a regression half the mean
            squared difference over the variance of the adapter's predictions (the KL of two normal distributions of
            that variance).
        agreement: Share of rows (positions) with the same most likely class (token); for a regression the correlation,
            negative ones as 0.
        chance: Agreement of two that choose each class as often as these do, but independently; 0 for a regression, whose
            correlation knows no chance.
        probability: Mean probability that the merge gives the adapter's most likely class; a regression's correlation.
        probability_chance: Probability that a merge gives it whose probabilities are on every row what they are on average.
        kl_base, agreement_base: KL and agreement with the bare base in the merge's place: what keeping nothing would score.
        n: Rows, or positions of text.
        capped: Mean of that probability or the adapter's own for the class, whichever is smaller; a regression's correlation. None in
            records of earlier versions.
        verbatim: Of answers that adapters wrote, the share that the merge would write word for word: at every position the adapter's
            token is its likeliest too; None where texts were only read.
        shift: Per layer, |h_merged - h_adapter| / |h_base - h_adapter| of the hidden states; () where not measured.
    """

    task: str
    kl: float
    agreement: float
    chance: float
    probability: float
    probability_chance: float
    kl_base: float
    agreement_base: float
    n: int
    shift: tuple[float, ...] = ()
    verbatim: float | None = None
    capped: float | None = None

    @property
    def beyond_chance(self) -> float:
        """(agreement - chance) / (1 - chance), Cohen's kappa: 1 for the adapter itself, 0 for an unrelated merge.

        It is to classes what the correlation is to values: a merge that always answers the same has 0 of both, however
        common that answer is. An adapter that itself answers all its texts alike leaves nothing to agree on: 0 for every
        merge.

        Source: Cohen, Educational and Psychological Measurement 20 (1960) 37-46.
        """
        return _beyond(self.agreement, self.chance)

    @property
    def followed(self) -> float:
        """How far a merge follows the adapter: the capped probability beyond chance, as `beyond_chance` is of the agreement.

        It still tells merges apart that choose alike, by how far they are from choosing otherwise; a row near the border
        moves it little. What a merge is surer of than the adapter itself counts no further: of adapters that say much the same, a merge
        that exaggerates would be called closer than the one that repeats them.
        """
        return _beyond(self.probability if self.capped is None else self.capped, self.probability_chance)

    @property
    def kept(self) -> float:
        """1 - KL / KL of the base: 1 for the adapter itself, 0 for the bare base, negative for worse than that."""
        return 1.0 - self.kl / max(self.kl_base, SMALLEST_BASE_KL)

    @property
    def kept_agreement(self) -> float:
        """Agreement where the base's is 0 and the adapter's own is 1; 0 to 1 in between, negative below the base."""
        room = max(1.0 - self.agreement_base, 1.0 / max(self.n, 1))
        return 1.0 - (1.0 - self.agreement) / room

    def fields(self) -> Mapping[str, float | tuple[float, ...]]:
        """List what was measured, without the task."""
        return {k: v for k, v in asdict(self).items() if k != "task" and v is not None}


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What one merge keeps of every adapter.

    Args:
        tasks: One per adapter, the worst first.
        general_kl: Mean KL(base || merged) on general text; None where there was none.
    """

    tasks: tuple[TaskFidelity, ...]
    general_kl: float | None = None

    @classmethod
    def of(cls, tasks: Sequence[TaskFidelity], general_kl: float | None = None) -> Fidelity:
        """Sorted, the worst adapter first."""
        return cls(tuple(sorted(tasks, key=lambda t: (t.kept, t.task))), general_kl)

    @property
    def score(self) -> float:
        """How far the adapters are followed on average: what candidates are ranked by; see `plait.fidelity.measure.aggregate`."""
        return aggregate(self.tasks)

    @property
    def kept(self) -> float:
        """Mean over adapters of 1 - KL / KL of the base: what a repair is kept by, since it learns from the same divergence."""
        return _mean([t.kept for t in self.tasks])

    @property
    def kept_agreement(self) -> float:
        """Mean over adapters of the agreement that is kept beyond the base's: what advice goes by."""
        return _mean([t.kept_agreement for t in self.tasks])

    @property
    def beyond_chance(self) -> float:
        """Mean over adapters of the agreement beyond chance: what decides over a repair beside the divergence that it learns from."""
        return _mean([t.beyond_chance for t in self.tasks])

    @property
    def worst(self) -> TaskFidelity:
        """The adapter that the merge keeps least of."""
        return self.tasks[0]


def aggregate(tasks: Sequence[TaskFidelity]) -> float:
    """Average over adapters how far a merge follows them: the probability of their answers, no more than their own, beyond chance.

    The probability's rank correlation with true scores was higher than that of agreement in all comparisons of
    docs/results/existing*.md (0.965 to 0.989), and what it chose was as good or better in all of them: a probability tells merges that
    answer alike apart. Those pages have it without a cap; with it what is chosen was as good or better where both were tried
    (`benchmarks/sureness.py`, docs/study/existing.md).

    Why not of what is kept beyond the base: dividing by the room that the base leaves an adapter turns the noise of a task on
    which both answer nearly alike into most of the mean. Why not of plain agreement: it counts a merge that has collapsed
    onto the commonest class as mostly faithful, and a hundred texts tell merges that choose alike apart by single rows. Why
    not of KL: it has no bound, so that the most confident adapter makes up most of the mean.

    >>> import math
    >>> math.isnan(aggregate([]))
    True
    """
    return _mean([t.followed for t in tasks])


def _beyond(value: float, chance: float) -> float:
    room = 1.0 - chance
    return (value - chance) / room if room > NO_ROOM_BELOW else 0.0


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


@dataclass(frozen=True, slots=True)
class Closeness:
    """How close outputs are to an adapter's; fields as `TaskFidelity` has them."""

    kl: float
    agreement: float
    chance: float
    probability: float
    probability_chance: float
    verbatim: float | None = None
    capped: float | None = None


def task_fidelity(task: str, merge: Closeness, base: Closeness, n: int) -> TaskFidelity:
    """Compare a merge's closeness to an adapter with the bare base's."""
    return TaskFidelity(task, **asdict(merge), kl_base=base.kl, agreement_base=base.agreement, n=n)


def closeness(kind: str, own: npt.NDArray[Any], merged: npt.NDArray[Any]) -> Closeness:
    """KL, agreement and agreement by chance of outputs with an adapter's.

    >>> adapter, merge = np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    >>> closeness("classification", adapter, merge).agreement
    0.5

    Args:
        kind: The task's; "regression" or anything with classes.
        own: The adapter's logits (n, classes), or values (n, 1).
        merged: The merge's.
    """
    a, b = own.astype(np.float64), merged.astype(np.float64)
    if kind == "regression":
        a, b = a.reshape(len(a)), b.reshape(len(b))
        spread = max(float(a.var()), 1e-12)
        r = max(0.0, _correlation(a, b))
        return Closeness(0.5 * float(((a - b) ** 2).mean()) / spread, r, 0.0, r, 0.0, capped=r)
    p, q = _log_softmax(a), _log_softmax(b)
    kl = float((np.exp(p) * (p - q)).sum(-1).mean())
    mine, theirs, given = a.argmax(-1), b.argmax(-1), np.exp(q)
    rows = np.arange(len(mine))
    chosen = given[rows, mine]
    shares = [np.bincount(top, minlength=a.shape[-1]) / len(a) for top in (mine, theirs)]
    return Closeness(
        kl,
        float((mine == theirs).mean()),
        float(shares[0] @ shares[1]),
        float(chosen.mean()),
        float(shares[0] @ given.mean(0)),
        capped=float(np.minimum(chosen, np.exp(p[rows, mine])).mean()),
    )


def _log_softmax(x: Floats) -> Floats:
    shifted = x - x.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _correlation(a: Floats, b: Floats) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else 0.0
