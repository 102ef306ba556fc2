"""What PEFT's adapter_config.json says of an adapter.

A classification merge holds the backbone's update and no head that PEFT knows of, and its names are the whole model's. What
PEFT 0.21 does with such a folder depends on `task_type` alone. With null it loads over AutoModelForSequenceClassification
(and over AutoModelForTokenClassification), applies the update to the backbone and leaves the head as it is; over AutoModel it
finds none of the modules and raises; AutoPeftModelForSequenceClassification raises too ("Cannot infer the auto class"), as
it has no head to give. SEQ_CLS, without a head's tensors inside, ends in a KeyError over every classifier. FEATURE_EXTRACTION
loads as null does, and promises the backbone's own class, over which it raises. So it is null. Names of the backbone
alone, which this config used to have, changed nothing over a classifier but for a warning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plait.adapters.config import CLASSIFICATION_TYPES, MERGED_TYPE, adapted_as
from plait.adapters.experts import is_parameter, keeps_targets, parameters_of, stacks_of
from plait.adapters.lora import EXPERT, Adapter, of_backbone
from plait.border.module_names import named_by
from plait.border.patterns import first_hits, matches
from plait.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Entry:
    """What PEFT has one rank and one alpha for: a module, a multi-head attention, or a fused weight with all its experts.

    Args:
        rank: Of the module, or the largest of the experts'.
        scaling: None where the experts' differ, or those of an attention's two layers.
    """

    rank: int
    scaling: float | None


def peft_config(adapter: Adapter, head: Mapping[str, Tensor] | None) -> tuple[dict[str, Any], bool]:
    """The adapter_config.json of an adapter, and whether scalings must be folded into B because no alpha expresses them."""
    entries = _entries(adapter)
    ranks = Counter(e.rank for e in entries.values())
    rank = max(ranks, key=lambda r: (ranks[r], r))
    alphas = {k: e.scaling * e.rank for k, e in entries.items() if e.scaling is not None}
    whole = {k: round(a) for k, a in alphas.items() if a > 0.5 and abs(round(a) - a) < 1e-9 * abs(a)}
    fold = len(whole) < len(entries)
    if fold:
        whole = {k: e.rank for k, e in entries.items()}
    alpha = Counter(whole[k] for k, e in entries.items() if e.rank == rank).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(adapter, head),
        "base_model_name_or_path": adapter.base,
        "revision": adapter.revision,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern({k: e.rank for k, e in entries.items()}, rank),
        "alpha_pattern": _pattern(whole, alpha),
        "target_modules": _targets(adapter),
        "modules_to_save": sorted({_saved(k, adapter.prefix) for k in head or {}} | {*adapter.modules_to_save}) or None,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,  # as PEFT saves it; `is_trainable=True` undoes it
    }
    if parameters := parameters_of(adapter):
        kept = keeps_targets(adapter) and not named_in_full(adapter)
        config["target_parameters"] = sorted(adapter.target_parameters if kept else map(adapter.full_name, parameters))
    return config, fold


def _pattern(values: Mapping[str, int], default: int) -> dict[str, int]:
    """PEFT's table of what is no default: the first key that a name ends in holds, so the longest stand first.

    A name that is the default and ends in another's key ("deep.q" beside "q") needs a key of its own.
    """
    longest_first = sorted(values, key=lambda k: (-len(k), k))
    own = {k: values[k] for k in longest_first if values[k] != default}
    hits = first_hits(own, longest_first, where="", what="pattern") if own else {}
    return {k: values[k] for k in longest_first if k in own or (k in hits and own[hits[k]] != values[k])}


def _saved(key: str, prefix: str) -> str:
    """The module of a head's tensor that PEFT is to put back whole: the top one, and of the backbone (a pooler) the layer alone."""
    return key.rpartition(".")[0] if of_backbone(prefix, key) else key.partition(".")[0]


def named_in_full(adapter: Adapter) -> bool:
    """Whether only names of the whole model keep PEFT from passing over the update, on a class that has another root.

    A text model's own class and its backbone's share no such names as adapters have ("model.layers"), and its trainers
    read `target_modules` as people write them.
    """
    return bool(adapter.prefix) and (adapter.task_type in CLASSIFICATION_TYPES or adapter.task_type == MERGED_TYPE)


def _task_type(adapter: Adapter, head: Mapping[str, Tensor] | None) -> str | None:
    if adapter.task_type in CLASSIFICATION_TYPES and not head:
        return None
    return None if adapter.task_type == MERGED_TYPE and adapter.prefix else adapter.task_type


def _entries(adapter: Adapter) -> dict[str, _Entry]:
    """PEFT's key, a module's name or a parameter's, -> its rank and scaling.

    Raises:
        InputError: A multi-head attention whose two layers differ in rank.
    """
    found: dict[str, _Entry] = {}
    for module, f in adapter.modules.items():
        if f.kind != EXPERT:
            weight = ".weight" if is_parameter(module, adapter.target_parameters) else ""
            key = adapted_as(adapter.full_name(module)) + weight
            other = found.setdefault(key, _Entry(f.rank, f.scaling))
            if other.rank != f.rank:
                what = (
                    f"rank {f.rank} inside {key!r}, a multi-head attention of rank {other.rank}: PEFT has one for both"
                )
                raise InputError(what, where=adapter.name, hint="--rank gives both the same")
            if other.scaling != f.scaling:
                found[key] = _Entry(f.rank, None)
    for parameter, experts in stacks_of(adapter.modules).items():
        scalings = {f.scaling for f in experts.values()}
        rank = max(f.rank for f in experts.values())
        found[adapter.full_name(parameter)] = _Entry(rank, scalings.pop() if len(scalings) == 1 else None)
    return found


def _targets(adapter: Adapter) -> list[str] | str:
    wanted, full = adapter.target_modules, named_in_full(adapter)
    if isinstance(wanted, str) and not adapter.prefix and not parameters_of(adapter) and _covers(wanted, adapter):
        return wanted
    own = {m for m in adapter.modules if is_parameter(m, adapter.target_parameters)}
    layers = [m for m, f in adapter.modules.items() if f.kind != EXPERT and m not in own]
    if isinstance(wanted, tuple) and not full:
        named = [t for t in wanted if not any(named_by(m, t) for m in own)]  # PEFT takes no parameter for a layer
        if all(any(named_by(m, t) for t in named) for m in layers):
            return sorted(named)
    return sorted(map(adapter.full_name, layers))


def _covers(pattern: str, adapter: Adapter) -> bool:
    """Whether PEFT's `target_modules` as one text names every module; one that cannot be tried in bounded time does not."""
    if pattern == "all-linear":
        return True
    names = sorted({adapted_as(m) for m in adapter.modules})
    try:
        return all(matches(rf"(?:{pattern})\Z", names, where=adapter.name, what="target_modules"))
    except (InputError, re.error, RecursionError, OverflowError):
        return False
