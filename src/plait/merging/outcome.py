"""The merged adapter around its modules, and what the record says about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from plait.adapters.heads import HeadFacts
from plait.adapters.lora import Adapter, LoraFactors
from plait.merging.align import Alignment


def labels_of(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """``labels`` for the record of a merge: head -> its class names; {} where no input's record tells any.

    PEFT's config names no classes, so that only heads that plait trained (or merged) have them.
    """
    found = {head: names for a in adapters for head, names in a.classes.items()}
    return {"labels": found} if found else {}


def head_facts_of(adapters: Sequence[Adapter]) -> dict[str, HeadFacts]:
    """What is known of every head that the inputs bring."""
    return {head: adapter.facts_of(head) for adapter in adapters for head in adapter.heads}


def assembled(name: str, common: Alignment, adapters: Sequence[Adapter], modules: dict[str, LoraFactors]) -> Adapter:
    """The adapter around merged modules: every input's heads, the union of targets."""
    heads: dict[str, dict[str, Tensor]] = {}
    for adapter in adapters:
        heads |= {task: dict(head) for task, head in adapter.heads.items()}
    facts = {
        k: a.source[k] for a in adapters for k in ("base_sha256", "base_weights_sha256", "format") if k in a.source
    }
    layouts = {k: v for a in reversed(adapters) for k, v in a.source.get("layouts", {}).items()}
    return Adapter(
        name=name,
        base=common.base,
        modules=modules,
        task_type=common.task_type,
        prefix=common.prefix,
        heads=heads,
        extras=common.carried.whole,
        modules_to_save=common.carried.saved,
        copies=common.carried.copies,
        revision=next((a.revision for a in adapters if a.revision), None),
        target_modules=_targets(adapters),
        target_parameters=tuple(sorted({t for a in adapters for t in a.target_parameters})),
        fan_in_fan_out=any(a.fan_in_fan_out for a in adapters),
        source={
            "backbone_prefix": common.backbone_prefix,
            "merged_from": [a.name for a in adapters],
            "layouts": layouts,
            **facts,
            **labels_of(adapters),
        },
        head_facts=head_facts_of(adapters),
    )


def _targets(adapters: Sequence[Adapter]) -> tuple[str, ...] | str | None:
    """The union of the inputs' target lists, or None where one of them is a pattern or was narrowed to some layers."""
    found: list[str] = []
    for adapter in adapters:
        if not isinstance(adapter.target_modules, tuple):
            return adapter.target_modules if len({a.target_modules for a in adapters}) == 1 else None
        found += [t for t in adapter.target_modules if t not in found]
    return tuple(sorted(found))


def discarded(
    modules: Mapping[str, LoraFactors], lost: Mapping[str, float], kept: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The fraction of the whole model's energy that cuts to rank lost, and the module that lost the largest share.

    Args:
        modules: After the cut.
        lost: Of each, in [0, 1].
        kept: The energy of each, where it is known.
    """
    if not any(lost.values()):
        return {"discarded_energy": 0.0, "worst_module": None}
    if kept is None:
        kept = {m: f.norm_squared() for m, f in modules.items()}
    before = {m: kept[m] / (1 - lost[m]) if lost[m] < 1 else 0.0 for m in modules}
    total = sum(before.values())
    worst = max(lost, key=lambda m: lost[m])
    gone = sum(before[m] - kept[m] for m in modules) / total if total > 0 else 0.0
    return {"discarded_energy": gone, "worst_module": {"name": worst, "discarded_energy": lost[worst]}}


def as_given(
    adapters: Sequence[Adapter], weights: Sequence[float], given: Sequence[str]
) -> list[tuple[Adapter, float]]:
    """Adapters and their weights in the order of the names that were given; as they stand where none are known."""
    pairs = list(zip(adapters, weights, strict=True))
    return sorted(pairs, key=lambda pair: given.index(pair[0].name)) if given else pairs


def input_hashes(adapters: Sequence[Adapter]) -> dict[str, str]:
    """What a merge's identity says of its inputs: the hash of each, and the commit of those from the hub."""
    found = {f"adapter:{a.name}": str(a.source.get("sha256", "")) for a in adapters}
    return found | {f"hub:{a.name}": str(a.source["hub"]) for a in adapters if "hub" in a.source}


def provenance(adapter: Adapter, weight: float) -> dict[str, Any]:
    """Where an input came from."""
    facts = {k: v for k, v in adapter.source.items() if isinstance(v, str | int | float | bool | list | dict)}
    mine = {"name": adapter.name, "weight": weight, "base": adapter.base, "revision": adapter.revision}
    return {**mine, "rank": adapter.rank, "task_type": adapter.task_type, "prefix": adapter.prefix, **facts}
