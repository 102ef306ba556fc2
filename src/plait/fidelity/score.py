"""Fidelity of many merges at once: every candidate, every adapter's texts, each base pass shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from plait.evaluation.evaluate import Logits
from plait.evaluation.fleet import Candidate, predict_many
from plait.fidelity.measure import Fidelity, TaskFidelity, closeness, task_fidelity
from plait.fidelity.panel import Panel, Part
from plait.model.stacked import Active

_BARE: Active = (None, 1.0)
Tell = Callable[[str], None]


def fidelities(panel: Panel, merges: Sequence[Active], tell: Tell = lambda _: None) -> list[Fidelity]:
    """Fidelity of each merge at its scale, in their order.

    Args:
        panel: Base, adapters and texts.
        merges: What is compared with every adapter.
        tell: Told each time the texts of an adapter are done, how many of the adapters that makes.

    Returns:
        KL and agreement per adapter, worst first; with `panel.general`, the mean KL(base || merged) on it.

    Raises:
        InputError: An adapter does not fit the base, or its head does not fit the model.

    Cost: (merges + 2) passes over the texts, a base's pass shared by as many as the device works well on.
    """
    if panel.is_text:
        from plait.fidelity.language import text_closeness, text_general

        by_task = [text_closeness(panel, part, merges) for part in _told(panel.parts, tell)]
        general = text_general(panel, merges) if panel.general else None
    else:
        by_task = [_classified(panel, part, merges) for part in _told(panel.parts, tell)]
        general = _general(panel, merges) if panel.general else None
    return [
        Fidelity.of([found[i] for found in by_task], float(general[i]) if general is not None else None)
        for i in range(len(merges))
    ]


def _told(parts: Sequence[Part], tell: Tell) -> Iterator[Part]:
    for done, part in enumerate(parts, 1):
        yield part
        tell(f"  texts of {part.name} ({done} of {len(parts)})")


def _classified(panel: Panel, part: Part, merges: Sequence[Active]) -> list[TaskFidelity]:
    own, bare, *found = outputs(panel, part, [(part.adapter, 1.0), _BARE, *merges])
    kind = part.task.kind
    base = closeness(kind, own, bare)
    return [task_fidelity(part.name, c, base, len(own)) for c in (closeness(kind, own, f) for f in found)]


def outputs(panel: Panel, part: Part, active: Sequence[Active]) -> list[Logits]:
    """Logits of a headed part's own texts, (n, classes) for each."""
    panel.model(part)
    return predict_many(panel.evaluator, part.name, [Candidate(part.head, a, s) for a, s in active])


def _general(panel: Panel, merges: Sequence[Active]) -> npt.NDArray[np.float64]:
    """Mean over the heads of KL(base || merged) on the general texts."""
    totals = np.zeros(len(merges))
    evaluator = panel.general_evaluator()
    for part in panel.parts:
        panel.model(part)
        bare, *found = predict_many(evaluator, part.name, [Candidate(part.head, a, s) for a, s in (_BARE, *merges)])
        totals += [closeness(part.task.kind, bare, f).kl for f in found]
    return totals / len(panel.parts)
