"""PEFT's adapter_config.json: what is read from it, what is refused by name, and what is written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import InputError
from plait.store import read_json

CONFIG = "adapter_config.json"
# Head modules PEFT itself saves for these task types (peft.tuners.tuners_utils, SEQ_CLS_HEAD names).
CLASSIFICATION_TYPES = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}
_RANK_LIMIT = 1 << 16
_ALPHA_LIMIT = 1e30  # above, float32 factors overflow
_PATTERN_LIMIT = 300
_CHOICES = 4  # parts of a pattern that can match in several ways

# Option -> why plait cannot treat such an adapter as W0 + scaling * B @ A.
_REFUSED = {
    "use_dora": "DoRA also trains a magnitude per output, so its update is not low rank",
    "lora_bias": "lora_bias adds a bias to B, which no LoRA factors hold",
    "alora_invocation_tokens": "aLoRA is active only after its invocation tokens; merging would make it always active",
    "use_qalora": "QALoRA pools the input before A, so its update is not B @ A",
    "use_bdlora": "BD-LoRA's factors are block-diagonal shards",
    "kasa_config": "KaSA truncates the base weight and adds a diagonal between A and B",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow routes between adapters at run time",
    "layer_replication": "layer_replication trains on a deeper model than the base",
    "target_parameters": "target_parameters adapts fused (3-D) expert weights, which are not linear modules",
    "trainable_token_indices": "trainable_token_indices trains embedding rows outside the LoRA factors",
}
# The way to a plain LoRA, where there is one.
_CONVERTED = {
    "use_dora": "plait convert --base DIR makes it a plain LoRA at the best rank",
    "lora_bias": "plait convert makes it a plain LoRA where its biases are zero, or without them",
    "trainable_token_indices": "plait convert --base DIR makes it a plain LoRA, exactly",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    r"""The fields of adapter_config.json that matter to arithmetic, checked.

    Args:
        base: `base_model_name_or_path`.
        r: Default rank.
        alpha: Default alpha.
        rslora: Whether scaling is alpha / sqrt(r).
        rank_pattern, alpha_pattern: Overrides; a key matches ``(.*\.)?KEY$``, the first hit wins, as in PEFT.
        target_modules: None also where layers or exclusions narrow it: then only the tensors say what is adapted.
    """

    base: str
    revision: str | None
    task_type: str | None
    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | str | None
    modules_to_save: tuple[str, ...]
    fan_in_fan_out: bool

    def rank_of(self, module: str) -> int:
        """Rank that the config promises for a module."""
        return self.rank_pattern.get(_hit(self.rank_pattern, module), self.r)

    def scaling_of(self, module: str, rank: int) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        alpha = self.alpha_pattern.get(_hit(self.alpha_pattern, module), self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _hit(pattern: Mapping[str, Any], module: str) -> str:
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), module)


def read_config(folder: Path) -> AdapterConfig:
    """Read and check a folder's adapter_config.json.

    Raises:
        InputError: Missing, not LoRA, out of range, or of a variant that cannot be merged (named, with the reason).
    """
    path = folder / CONFIG
    if not path.exists():
        raise InputError(f"no {CONFIG}", where=str(folder), hint="expected a PEFT adapter folder")
    return checked_config(read_json(path, limit=16 << 20), path)


def checked_config(raw: Any, path: Path) -> AdapterConfig:
    """The fields of a config that was read from `path`; raises as `read_config`."""
    if not isinstance(raw, dict):
        raise InputError("not a JSON object", where=str(path))
    refuse_variants(raw, str(path))
    narrowed = any(raw.get(k) for k in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    return AdapterConfig(
        base=_text(raw, "base_model_name_or_path", path) or "",
        revision=_text(raw, "revision", path),
        task_type=_text(raw, "task_type", path),
        r=_rank(raw.get("r", 8), "r", path),
        alpha=_alpha(raw.get("lora_alpha", 8), "lora_alpha", path),
        rslora=bool(raw.get("use_rslora", False)),
        rank_pattern={k: _rank(v, f"rank_pattern[{k}]", path) for k, v in _mapping(raw, "rank_pattern", path).items()},
        alpha_pattern={
            k: _alpha(v, f"alpha_pattern[{k}]", path) for k, v in _mapping(raw, "alpha_pattern", path).items()
        },
        target_modules=None if narrowed else _strings(raw.get("target_modules"), "target_modules", path),
        modules_to_save=_list(raw.get("modules_to_save"), "modules_to_save", path),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out", False)),
    )


def refuse_variants(raw: Mapping[str, Any], where: str) -> None:
    """Raise for LoRA variants whose update is not scaling * B @ A on the unchanged base, naming the reason."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise InputError(f"peft_type is {kind!r}, only LORA adapters can be merged", where=where)
    for key, why in _REFUSED.items():
        if raw.get(key):
            step = _CONVERTED.get(key, "merge this adapter into its base and serve it separately")
            if Path(where).name == CONFIG:
                step = step.replace("plait convert", f"plait convert {Path(where).parent}", 1)
            raise InputError(f"{key}: {why}", where=where, hint=step)
    if raw.get("bias", "none") != "none":
        raise InputError(f"bias={raw['bias']!r}: trained biases are outside the LoRA factors", where=where)
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"init_lora_weights={init!r} changed the base weights, so these factors are not an update of the original base",
            where=where,
            hint="convert it first: plait convert --initial with the adapter as it was before training, or "
            "peft's save_pretrained(path_initial_model_for_weight_conversion=...)",
        )


def _rank(value: Any, key: str, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _RANK_LIMIT:
        raise InputError(f"{key} is {value!r}, expected an integer from 1 to {_RANK_LIMIT}", where=str(path))
    return value


def _alpha(value: Any, key: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _ALPHA_LIMIT:
        raise InputError(f"{key} is {value!r}, expected a finite number above 0", where=str(path))
    return float(value)


def _mapping(raw: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{key} is not an object", where=str(path))
    for name in value:
        _require_quick(name, f"{key}[{name}]", path)
    return value


def _require_quick(pattern: str, key: str, path: Path) -> None:
    """PEFT matches these keys as regexes, and a regex can take forever: none with nested or many ways to match is tried.

    An optional part, a repetition and a group of alternatives each multiply the ways; what follows an opening bracket
    ("(?:") is none of them.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise InputError(f"{key} is not a regex: {e}", where=str(path)) from None
    bare = pattern.replace("(?", "(")
    choices = len(re.findall(r"[*+{?]", bare)) + (bare.count("(") if "|" in bare else 0)
    if len(pattern) > _PATTERN_LIMIT or re.search(r"\)[*+{]", bare) or choices > _CHOICES:
        raise InputError(f"{key} could take forever to match", where=str(path), hint="name the modules plainly")


def _text(raw: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{key} is not a string", where=str(path))
    return value


def _list(value: Any, key: str, path: Path) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise InputError(f"{key} is not a list of strings", where=str(path))
    return tuple(sorted(set(value)))


def _strings(value: Any, key: str, path: Path) -> tuple[str, ...] | str | None:
    return value if isinstance(value, str) else _list(value, key, path) or None
