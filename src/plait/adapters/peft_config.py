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

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.adapters.config import CLASSIFICATION_TYPES, MERGED_TYPE
from plait.adapters.lora import Adapter


def peft_config(adapter: Adapter, head: Mapping[str, Tensor] | None) -> tuple[dict[str, Any], bool]:
    """The adapter_config.json of an adapter, and whether scalings must be folded into B because no alpha expresses them."""
    ranks = Counter(f.rank for f in adapter.modules.values())
    rank = max(ranks, key=lambda r: (ranks[r], r))
    alphas = {m: f.scaling * f.rank for m, f in adapter.modules.items()}
    whole = {m: round(a) for m, a in alphas.items() if a > 0.5 and abs(round(a) - a) < 1e-9 * abs(a)}
    fold = len(whole) < len(alphas)
    if fold:
        whole = {m: f.rank for m, f in adapter.modules.items()}
    alpha = Counter(whole[m] for m, f in adapter.modules.items() if f.rank == rank).most_common(1)[0][0]
    longest_first = sorted(adapter.modules, key=lambda m: (-len(m), m))  # PEFT: the first key that is a suffix wins
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(adapter, head),
        "base_model_name_or_path": adapter.base,
        "revision": adapter.revision,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {
            adapter.full_name(m): adapter.modules[m].rank for m in longest_first if adapter.modules[m].rank != rank
        },
        "alpha_pattern": {adapter.full_name(m): whole[m] for m in longest_first if whole[m] != alpha},
        "target_modules": _targets(adapter),
        "modules_to_save": sorted({k.partition(".")[0] for k in head}) if head else None,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,  # as PEFT saves it; `is_trainable=True` undoes it
    }
    return config, fold


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


def _targets(adapter: Adapter) -> list[str] | str:
    if named_in_full(adapter):
        return sorted(adapter.full_name(m) for m in adapter.modules)
    if isinstance(adapter.target_modules, str) and not adapter.prefix:
        return adapter.target_modules
    wanted = adapter.target_modules
    if isinstance(wanted, tuple) and all(any(m == t or m.endswith(f".{t}") for t in wanted) for m in adapter.modules):
        return sorted(wanted)
    return sorted(adapter.full_name(m) for m in adapter.modules)
