"""How long a choice or an advice with texts will take: its work is counted, and what this machine does of it is timed on a few texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import torch

from plait.adapters.lora import Adapter
from plait.adapters.one_thread import in_one_thread
from plait.choosing.candidates import METHODS, merged_by, recipes
from plait.fidelity.answers import Answers
from plait.fidelity.moments import collect_moments, merged_kinds, moments_of
from plait.fidelity.panel import Panel
from plait.fidelity.score import fidelities
from plait.fidelity.texts import Texts
from plait.fidelity.tokens import rows_of
from plait.learning.distil import distil
from plait.learning.losses import loss_of
from plait.merging.metric import cut_solution
from plait.progress import in_words

# Texts of each adapter that are timed, short and long ones; scales of one adapter that read them together; steps; the side of a system;
# modules that are merged.
_FEW, _TOGETHER, _STEPS, _SIDE, _SAMPLED = 8, 8, 2, 512, 4


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do.

    Args:
        reads: Tokens that candidates read, each candidate's counted.
        moments: Tokens whose moments are taken.
        merges: Merges that are made.
        learnt: Steps in which weights are learnt.
        repaired: Steps in which factors are.
        fitted: Tokens that fits front to back read, one of them each time.
        solved: Layers that fits solve for.
    """

    reads: float = 0.0
    moments: float = 0.0
    merges: float = 0.0
    learnt: float = 0.0
    repaired: float = 0.0
    fitted: float = 0.0
    solved: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Add up two works."""
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        """Do it so often."""
        return Work(*(a * times for a in astuple(self)))


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds for one of each, as `Work` counts them."""

    seconds: Work

    def seconds_of(self, work: Work) -> float:
        """Say how long a work takes."""
        return float(sum(a * b for a, b in zip(astuple(self.seconds), astuple(work), strict=True)))


def pace_of(panel: Panel, adapters: Sequence[Adapter], clock: Callable[[], float] = time.perf_counter) -> Pace:
    """Time on a few texts of each adapter what a choice is made of.

    A fit runs a text twice through the model, a block at a time, and multiplies what each layer reads by itself: `_FIT` readings. Merges
    are timed on a few modules, by every method; a step that moves factors takes a little longer than one of weights.

    Args:
        panel: Base, adapters and texts.
        adapters: What will be merged.
        clock: Seconds of the machine.

    Cost: some hundred texts' passes; a per cent or two of a choice among adapters with 100 texts each.
    """
    apart = replace(panel, known=Answers())  # what is only timed decides nothing
    few, alike = (apart.with_texts(some(panel.texts), general=False) for some in (_spread, _alike))
    first = few.parts[0].adapter

    def timed(do: Callable[[], object]) -> float:
        started = clock()
        do()
        return clock() - started

    timed(lambda: fidelities(alike, [(first, 0.5)]))  # whatever is loaded or compiled once
    many = [(first, 0.5 + 0.01 * i) for i in range(1, _TOGETHER + 1)]
    read = timed(lambda: fidelities(alike, many)) / (tokens_of(alike) * (len(many) + (2 if panel.is_text else 0)))
    loss = loss_of(few)
    for _ in range(2):  # the first time warms up
        step = timed(lambda: distil(few, first, learns="weights", steps=_STEPS, loss=loss)) / _STEPS
    part = few.parts[0]
    for _ in range(2):
        moments = timed(lambda: moments_of(alike, part, None)) / _tokens(alike, 0)
    known = collect_moments(alike)
    tried, (sampled, share) = list(recipes(merged_kinds(known), METHODS)), _sampled(adapters)
    for _ in range(2):
        merge = timed(lambda: [merged_by(recipe, sampled, known) for recipe in tried]) / (len(tried) * share)
    solve = timed(lambda: _solved(_SIDE)) / _SIDE**3
    sizes = [max(f.shape) for f in first.modules.values()]
    return Pace(
        Work(
            read, moments, merge, step, _REPAIR * step, _FIT * read,
            solve * sum(n**3 for n in sizes) / len(sizes),
        )
    )  # fmt: skip


_FIT, _REPAIR = 3.5, 1.3
TIMING = "timing a few texts, to say how long it will take"


def _sampled(adapters: Sequence[Adapter]) -> tuple[list[Adapter], float]:
    """Keep a few modules that all adapters have, and the share they are of all; everything where there are none."""
    modules = {m for a in adapters for m in a.modules}
    shared = [m for m in adapters[0].modules if all(m in a.modules for a in adapters)][:_SAMPLED]
    if not shared:
        return list(adapters), 1.0
    return [replace(a, modules={m: a.modules[m] for m in shared}) for a in adapters], len(shared) / len(modules)


def told(panel: Panel, adapters: Sequence[Adapter], work: Work) -> str:
    """Say how long a work takes, at this machine's pace."""
    most = ", if a repair takes all its steps" if work.repaired else ""
    return f"about {in_words(pace_of(panel, adapters).seconds_of(work))} from here{most}"


def tokens_of(panel: Panel) -> int:
    """Count the tokens of all texts."""
    return sum(_tokens(panel, i) for i in range(len(panel.parts)))


def _tokens(panel: Panel, part: int) -> int:
    return sum(len(r["input_ids"]) for r in rows_of(panel, panel.parts[part]))


def _spread(texts: Mapping[str, Texts]) -> dict[str, Texts]:
    """A few texts of each part, from short to long, as a step takes them."""
    places = {
        t: [(2 * i + 1) * len(rows) // (2 * _FEW) for i in range(min(_FEW, len(rows)))] for t, rows in texts.items()
    }
    return {t: tuple(_by_length(rows)[p] for p in places[t]) for t, rows in texts.items()}


def _alike(texts: Mapping[str, Texts]) -> dict[str, Texts]:
    """A few texts of each part of like length, as passes read them."""
    starts = {t: max(0, (len(rows) - _FEW) // 2) for t, rows in texts.items()}
    return {t: tuple(_by_length(rows)[starts[t] : starts[t] + _FEW]) for t, rows in texts.items()}


def _by_length(rows: Texts) -> list[tuple[str, ...]]:
    return sorted(rows, key=lambda row: sum(map(len, row)))


def _solved(side: int) -> None:
    """What a fit does with a layer of this width, of rank 8."""
    system = torch.eye(side, dtype=torch.float64) + torch.full((side, side), 0.01, dtype=torch.float64)
    right = torch.sin(torch.arange(side * side, dtype=torch.float64)).view(side, side)
    solution = torch.cholesky_solve(right.T, in_one_thread(torch.linalg.cholesky, system)).T
    cut_solution(solution, right, 8)
