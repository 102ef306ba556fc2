"""Moments of the adapters' own texts: of the base's activations, and of each adapter's."""

from __future__ import annotations

from collections.abc import Mapping

from plait.adapters.lora import LINEAR, Adapter
from plait.fidelity.panel import Panel, Part
from plait.fidelity.tokens import rows_of
from plait.model.applied import applied
from plait.statistics.agreement import merge_statistics
from plait.statistics.collect import collect_statistics
from plait.statistics.moments import Statistics
from plait.tasks import batches

BASE_MOMENTS, OWN_MOMENTS = "base", "own"  # of inputs to the bare base, or to the base with the adapter on


def collect_moments(panel: Panel) -> dict[str, dict[str, Statistics]]:
    """Second moments of what every adapted module reads, on each adapter's own texts.

    The statistics of RegMean's paper are those of the fine-tuned models ("own"); those of the base serve every method
    here. An adapter with several heads adds up the texts of all of them.

    Returns:
        "base" and "own" -> adapter -> statistics.

    Cost: two passes over all texts.
    """
    moments: dict[str, dict[str, Statistics]] = {BASE_MOMENTS: {}, OWN_MOMENTS: {}}
    for kind, by_adapter in moments.items():
        for part in panel.parts:
            one = moments_of(panel, part, part.adapter if kind == OWN_MOMENTS else None)
            known = by_adapter.get(part.adapter.name)
            by_adapter[part.adapter.name] = merge_statistics(known, one) if known else one
    return moments


def moments_of(panel: Panel, part: Part, active: Adapter | None) -> Statistics:
    """Collect the moments of a part's texts in every module that any adapter changes, with one of them on the base or none."""
    modules = sorted({m for p in panel.parts for m, f in p.adapter.modules.items() if f.kind == LINEAR})
    model = panel.model(part)
    with applied(model, active):
        return collect_statistics(
            model,
            batches(panel.tokenizer, rows_of(panel, part), panel.batch_size, by_length=True),
            modules,
            provenance={"task": part.name},
            result_device="cpu",
        )


def merged_kinds(moments: Mapping[str, Mapping[str, Statistics]]) -> tuple[str, ...]:
    """List the kinds of moments there are."""
    return tuple(k for k, v in moments.items() if v)
