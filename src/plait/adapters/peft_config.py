"""What PEFT's adapter_config.json says of an adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.adapters.config import CLASSIFICATION_TYPES
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
        "task_type": adapter.task_type if head or adapter.task_type not in CLASSIFICATION_TYPES else None,
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
        "inference_mode": adapter.task_type is None or adapter.task_type == "FEATURE_EXTRACTION",
    }
    return config, fold


def _targets(adapter: Adapter) -> list[str] | str:
    if isinstance(adapter.target_modules, str) and not adapter.prefix:
        return adapter.target_modules
    wanted = adapter.target_modules
    if isinstance(wanted, tuple) and all(any(m == t or m.endswith(f".{t}") for t in wanted) for m in adapter.modules):
        return sorted(wanted)
    return sorted(adapter.full_name(m) for m in adapter.modules)
