"""Fidelity of many merges at once: every candidate, every adapter's texts, each base pass shared."""

from __future__ import annotations

import time
from collections.abc import Iterator, MutableMapping, Sequence

import numpy as np
import numpy.typing as npt

from plait.adapters.lora import Adapter
from plait.evaluation.evaluate import Logits
from plait.evaluation.fleet import Candidate, predict_many
from plait.fidelity.answers import Rows
from plait.fidelity.measure import Fidelity, TaskFidelity, closeness, task_fidelity
from plait.fidelity.panel import Panel, Part
from plait.model.stacked import Active
from plait.progress import OnProgress, duration

_BARE: Active = (None, 1.0)


def fidelities(
    panel: Panel,
    merges: Sequence[Active],
    on_progress: OnProgress = lambda _: None,
    *,
    keep: bool = False,
    by_part: MutableMapping[str, list[TaskFidelity]] | None = None,
) -> list[Fidelity]:
    """Fidelity of each merge at its scale, in their order.

    Args:
        panel: Base, adapters and texts.
        merges: What is compared with every adapter.
        on_progress: Called after each adapter's texts, with the number done.
        keep: Whether what heads answer with these merges is kept in `panel.known`, because more texts will be asked about.
        by_part: Part -> what was measured on its texts already; completed part by part.

    Returns:
        KL and agreement per adapter, worst first; with `panel.general`, the mean KL(base || merged) on it.

    Raises:
        InputError: An adapter does not fit the base, or its head does not fit the model.

    Cost: a pass over the texts for every merge, and once for every adapter and for the base, shared by as many as the device works
    well on. Of classifiers, texts of which the answers are kept are not read again.
    """
    done = {} if by_part is None else by_part
    lacking = [part for part in panel.parts if part.name not in done]
    for part in _reported(lacking, len(panel.parts), on_progress):
        done[part.name] = _of_part(panel, part, merges, keep)
    by_task = [done[part.name] for part in panel.parts]
    general = general_shift(panel, merges) if panel.general else None
    return [
        Fidelity.of([tasks[i] for tasks in by_task], float(general[i]) if general is not None else None)
        for i in range(len(merges))
    ]


def general_shift(panel: Panel, merges: Sequence[Active]) -> npt.NDArray[np.float64]:
    """Mean KL(base || merged) of each merge on the panel's general texts, in nats."""
    if panel.is_text:
        from plait.fidelity.language import text_general

        return text_general(panel, merges)
    return _general(panel, merges)


def _reported(lacking: Sequence[Part], of: int, on_progress: OnProgress) -> Iterator[Part]:
    """Give the parts that are not measured yet, and say of each when it is; those before them took no time, and tell nothing of it."""
    started = time.monotonic()
    for done, part in enumerate(lacking, 1):
        yield part
        left = (time.monotonic() - started) * (len(lacking) - done) / done
        said = f", about {duration(left)} left of these" if done < len(lacking) else ""
        on_progress(f"  texts of {part.name} ({of - len(lacking) + done} of {of}){said}")


def _of_part(panel: Panel, part: Part, merges: Sequence[Active], keep: bool) -> list[TaskFidelity]:
    if panel.is_text:
        from plait.fidelity.language import text_closeness

        return text_closeness(panel, part, merges)
    return _classified(panel, part, merges, keep)


def _classified(panel: Panel, part: Part, merges: Sequence[Active], keep: bool) -> list[TaskFidelity]:
    own, bare, *merged = outputs(panel, part, [(part.adapter, 1.0), _BARE, *merges], keep=keep)
    kind = part.task.kind
    base = closeness(kind, own, bare)
    return [task_fidelity(part.name, c, base, len(own)) for c in (closeness(kind, own, f) for f in merged)]


def outputs(panel: Panel, part: Part, active: Sequence[Active], *, keep: bool = False) -> list[Logits]:
    """Logits of a headed part's own texts, (n, classes) for each; what is known already is not computed again.

    Args:
        panel: Base, adapters and texts.
        part: Part whose texts and head are asked.
        active: Adapters or merges, each with a scale.
        keep: Whether all answers are kept in `panel.known`; those of the base and of the panel's own adapters always are.
    """
    panel.model(part)
    texts = panel.texts[part.name]
    own = {id(p.adapter) for p in panel.parts}
    rows: list[Rows] = []
    asked: dict[tuple[bool, tuple[int, ...]], list[int]] = {}
    for i, (adapter, scale) in enumerate(active):
        always = adapter is None or id(adapter) in own
        rows.append(panel.known.of(part.name, adapter, scale) if keep or always else {})
        if lacking := tuple(n for n, text in enumerate(texts) if text not in rows[i]):
            # What always stays is asked by itself: its last bits then do not hang on what else is looked at.
            asked.setdefault((always, lacking), []).append(i)
    for (_, lacking), places in asked.items():
        worn = [_worn(part, *active[i]) for i in places]
        some = None if len(lacking) == len(texts) else np.array(lacking, np.int64)
        for i, logits in zip(places, predict_many(panel.evaluator, part.name, worn, some), strict=True):
            rows[i].update(zip((texts[n] for n in lacking), logits, strict=True))
    return [np.stack([known[text] for text in texts]) for known in rows]


def _worn(part: Part, adapter: Adapter | None, scale: float) -> Candidate:
    """An adapter with its own head of that task, where it carries one; else with the part's."""
    return Candidate(part.head if adapter is None else adapter.heads.get(part.name, part.head), adapter, scale)


def _general(panel: Panel, merges: Sequence[Active]) -> npt.NDArray[np.float64]:
    """Mean over the heads of KL(base || merged) on the general texts."""
    totals = np.zeros(len(merges))
    evaluator = panel.general_evaluator()
    for part in panel.parts:
        panel.model(part)
        bare, *merged = predict_many(evaluator, part.name, [_worn(part, a, s) for a, s in (_BARE, *merges)])
        totals += [closeness(part.task.kind, bare, f).kl for f in merged]
    return totals / len(panel.parts)
