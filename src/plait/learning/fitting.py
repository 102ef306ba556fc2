"""The chosen merge, fitted front to back to the adapters on their texts, where texts held out say that it is closer then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plait.adapters.lora import Adapter
from plait.fidelity.panel import Panel
from plait.fidelity.score import fidelities, general_shift
from plait.fidelity.texts import split_off
from plait.fidelity.tokens import rows_of
from plait.merging.methods.featcal import featcal
from plait.model.applied import resolve
from plait.progress import OnProgress
from plait.tasks import batches, to_device

# What is tried: how strongly the fit is pulled towards the merge, and how far that is stretched, as a power of the number of
# adapters. Both were the best of their kind for eight adapters of MPNet (docs/results/existing-fitted.md): weak and short, strong
# and long.
TRIED = ((0.05, 0.5), (0.003, 0.2))
SCALES = (1.0, 1.15, 1.3, 1.5)


@dataclass(frozen=True, slots=True)
class Fit:
    """Settings of a fit, as `featcal` has them."""

    pull: float
    reach: float
    scale: float


def can_fit(panel: Panel) -> bool:
    """Whether a merge can be fitted here: of encoder-decoder models two kinds of padding would have to be told apart."""
    return not any(part.task.kind == "seq2seq" for part in panel.parts)


def best_fit(
    panel: Panel,
    adapters: Sequence[Adapter],
    start: Adapter,
    *,
    rank: int | None = None,
    max_shift: float | None = None,
    on_progress: OnProgress = lambda _: None,
) -> tuple[Fit, float] | None:
    """Find the fit that is closest to the adapters on texts that were held out, and its score there; None where no fit is within the limit.

    Args:
        panel: Base, adapters and texts.
        adapters: What was merged.
        start: The merge.
        rank: Rank of the result; that of the sum by default.
        max_shift: Most KL to the base on the panel's general texts, in nats: a fit beyond it is none.
        on_progress: Called before each fit.

    Cost: two fits, and as many passes over the texts held out as there are scales for each.
    """
    most, rest = split_off(panel.texts)
    seen, judged = panel.with_texts(most, general=False), panel.with_texts(rest, general=False)
    tried: list[tuple[Fit, Adapter]] = []
    for i, (pull, power) in enumerate(TRIED, 1):
        on_progress(f"fitting it front to back ({i} of {len(TRIED)})")
        fit = Fit(pull, float(f"{len(adapters) ** power:.3g}"), 1.0)
        merge = fitted(seen, adapters, start, fit, rank=rank)
        tried += [(Fit(fit.pull, fit.reach, scale), merge) for scale in SCALES]
    scores = [f.score for f in fidelities(judged, [(merge, fit.scale) for fit, merge in tried])]
    near = list(range(len(tried)))
    if max_shift is not None:
        shifts = general_shift(panel, [(merge, fit.scale) for fit, merge in tried])
        near = [i for i in near if shifts[i] <= max_shift]
    if not near:
        return None
    best = max(near, key=lambda i: scores[i])
    return tried[best][0], scores[best]


def fitted(
    panel: Panel,
    adapters: Sequence[Adapter],
    start: Adapter,
    fit: Fit,
    *,
    rank: int | None = None,
    base: str | None = None,
) -> Adapter:
    """Fit a merge on all texts of a panel (`featcal`).

    Args:
        panel: Base, adapters and texts.
        adapters: What was merged.
        start: The merge, its scale folded in.
        fit: How.
        rank: Rank of the result; that of the sum by default.
        base: Base id of the result where the adapters name one base by different names.
    """
    device = panel.base.torch_device
    read: dict[str, list[dict[str, Tensor]]] = {a.name: [] for a in adapters}
    for part in panel.parts:
        model = panel.model(part)
        rows = batches(panel.tokenizer, rows_of(panel, part), panel.batch_size, by_length=True)
        read[part.adapter.name] += [to_device({k: v for k, v in b.items() if k != "labels"}, device) for b in rows]

    def forward(_: str, batch: Mapping[str, Tensor]) -> Any:
        return model(**batch)  # no adapted layer lies in a head: any task's model will do

    modules = {m: resolve(model, m, a.prefix) for a in adapters for m in a.modules}
    done = featcal(
        adapters, model, forward, read, modules=modules, start=start, pull=fit.pull, reach=fit.reach, scale=fit.scale,
        rank=rank, base=base, name=start.name,
    )  # fmt: skip
    return done.adapter
