"""PEFT's adapter_config.json: what is read from it, what is refused by name, and what is written."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.adapters.places import CONFIG as CONFIG
from plait.adapters.places import inside
from plait.border.checked import Record, shown
from plait.border.patterns import first_hits, require_patterns
from plait.disk.store import read_json
from plait.errors import InputError

# Head modules PEFT itself saves for these task types (peft.tuners.tuners_utils, SEQ_CLS_HEAD names).
CLASSIFICATION_TYPES = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}
# Type of an adapter of a backbone: what a merge of classifiers is.
MERGED_TYPE = "FEATURE_EXTRACTION"
_RANK_LIMIT = 1 << 16
_ALPHA_LIMIT = 1e30  # above, float32 factors overflow
_TEXT_LIMIT = 1024
LARGEST_CONFIG = 4 << 20  # of 18,000 modules with a rank and an alpha each, 3 MB

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
    "trainable_token_indices": "trainable_token_indices trains embedding rows outside the LoRA factors",
}
# The way to a plain LoRA, where there is one.
_CONVERTED = {
    "use_dora": "plait convert --base DIR makes it a plain LoRA at the best rank",
    "lora_bias": "plait convert makes it a plain LoRA where its biases are zero, or without them",
    "trainable_token_indices": "plait convert --base DIR makes it a plain LoRA, exactly",
}
# Kinds of PEFT's of which PEFT 0.21 itself makes LoRA.
_MADE_LORA = {"LOHA", "LOKR", "VERA", "MISS", "RANDLORA", "FOURIERFT", "C3A", "DELORA", "GRALORA", "WAVEFT", "VBLORA"}
_HINT = "correct it, or save the adapter again"
_FLAGS = {"use_dora", "lora_bias", "use_qalora"}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
# Between a multi-head attention's name and that of its output layer, which has the attention's rank and alpha.
_INSIDE = ".base_layer."


def adapted_as(module: str) -> str:
    """The name by which PEFT looks a module's rank and alpha up: a multi-head attention's for the output layer inside it.

    >>> adapted_as("attn.base_layer.out_proj"), adapted_as("q_proj")
    ('attn', 'q_proj')
    """
    return module.partition(_INSIDE)[0]


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
        where: The file it was read from.
        target_parameters: Weights that are adapted as parameters; see `experts`.
        listed: The list of target_modules, narrowed or not.
        weight_tying: Whether PEFT trained the output layer tied to the embedding (`ensure_weight_tying`).
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
    where: str = ""
    target_parameters: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    weight_tying: bool = False

    def promised(self, modules: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Module -> the rank and the alpha that the config promises.

        Raises:
            InputError: A pattern that takes too long to match.
        """
        names = {m: adapted_as(m) for m in modules}
        looked_up = list(dict.fromkeys(names.values()))
        ranks = first_hits(self.rank_pattern, looked_up, where=self.where, what="rank_pattern")
        alphas = first_hits(self.alpha_pattern, looked_up, where=self.where, what="alpha_pattern")
        return {
            m: (
                self.rank_pattern[ranks[n]] if n in ranks else self.r,
                self.alpha_pattern[alphas[n]] if n in alphas else self.alpha,
            )
            for m, n in names.items()
        }

    def scaling(self, alpha: float, rank: int) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_config(folder: Path) -> AdapterConfig:
    """Read and check a folder's adapter_config.json.

    Raises:
        InputError: Missing, not LoRA, out of range, or of a variant that cannot be merged (named, with the reason).
    """
    return checked_config(read_raw_config(folder), folder / CONFIG)


def read_raw_config(folder: Path) -> dict[str, Any]:
    """Everything that a folder's adapter_config.json says, its values not looked at yet.

    Raises:
        InputError: Missing, over `LARGEST_CONFIG` bytes, or no JSON object.
    """
    path = folder / CONFIG
    if not path.exists():
        whole = (folder / "config.json").is_file()
        hint = (
            "a whole model? plait extract makes a LoRA of a full fine-tune"
            if whole
            else "expected a PEFT adapter folder"
        )
        raise InputError(f"no {CONFIG}", where=str(folder), hint=inside(folder) or hint)
    raw = read_json(path, limit=LARGEST_CONFIG)
    return dict(Record.of(raw, str(path), hint="expected a PEFT adapter folder").values)


def checked_config(raw: Mapping[str, Any], path: Path) -> AdapterConfig:
    """The fields of a config that was read from `path`; raises as `read_config`."""
    record = Record.of(raw, str(path), hint=_HINT)
    refuse_variants(raw, str(path))
    narrowed = any(raw.get(k) for k in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    ranks, alphas = (record.record(k, optional=True) for k in ("rank_pattern", "alpha_pattern"))
    require_patterns(ranks.values, str(path), "rank_pattern")
    require_patterns(alphas.values, str(path), "alpha_pattern")
    return AdapterConfig(
        base=_text(record, "base_model_name_or_path") or "",
        revision=_text(record, "revision"),
        task_type=_text(record, "task_type"),
        r=record.integer("r", 1, _RANK_LIMIT, 8),
        alpha=_alpha(record, "lora_alpha", 8),
        rslora=record.flag("use_rslora", False),
        rank_pattern={k: ranks.integer(k, 1, _RANK_LIMIT) for k in ranks.values},
        alpha_pattern={k: _alpha(alphas, k) for k in alphas.values},
        target_modules=None if narrowed else _targets(record),
        modules_to_save=tuple(sorted(set(record.texts("modules_to_save", ())))),
        fan_in_fan_out=record.flag("fan_in_fan_out", False),
        where=str(path),
        target_parameters=tuple(sorted(set(record.texts("target_parameters", ())))),
        listed=tuple(record.texts("target_modules", ())) if isinstance(raw.get("target_modules"), list) else (),
        weight_tying=record.flag("ensure_weight_tying", False),
    )


def refuse_variants(raw: Mapping[str, Any], where: str) -> None:
    """Raise for LoRA variants whose update is not scaling * B @ A on the unchanged base, naming the reason."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        hint = "PEFT makes a LoRA of it, at a rank of your choice: peft.save_as_lora(DIR, model, rank=R)"
        what = f"peft_type is {shown(kind)}, only LORA adapters can be merged"
        raise InputError(what, where=where, hint=hint if isinstance(kind, str) and kind in _MADE_LORA else None)
    record = Record.of(raw, where, hint=_HINT)
    for key, why in _REFUSED.items():
        if record.flag(key, False) if key in _FLAGS else raw.get(key):
            step = _CONVERTED.get(key, "merge this adapter into its base and serve it separately")
            if Path(where).name == CONFIG:
                step = step.replace("plait convert", f"plait convert {shlex.quote(str(Path(where).parent))}", 1)
            raise InputError(f"{key}: {why}", where=where, hint=step)
    if raw.get("bias", "none") != "none":
        raise InputError(
            f"bias={shown(raw['bias'])}: trained biases are outside the LoRA factors",
            where=where,
            hint="serve it as it is, or train with bias='none'; PEFT's merge_and_unload puts it into a model",
        )
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"init_lora_weights={init!r} changed the base weights, so these factors are not an update of the original base",
            where=where,
            hint="convert it first: plait convert --initial with the adapter as it was before training, or "
            "peft's save_pretrained(path_initial_model_for_weight_conversion=...)",
        )


def _alpha(record: Record, key: str, *default: float) -> float:
    return record.number(key, 0.0, _ALPHA_LIMIT, *default, above=True)


def _text(record: Record, key: str) -> str | None:
    """A text that names something, or None."""
    if not record.has(key):
        return None
    value = record.text(key, longest=_TEXT_LIMIT)
    if "\0" in value:
        raise record.wrong(key, value, "a text without NUL")
    return value


def _targets(record: Record) -> tuple[str, ...] | str | None:
    if isinstance(record.values.get("target_modules"), str):
        return record.text("target_modules")
    return tuple(sorted(set(record.texts("target_modules", ())))) or None
