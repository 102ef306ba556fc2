"""A base is loaded whole or not at all: what may be missing from its files, what may lie there unused, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from plait.border.counts import agreed, plural
from plait.errors import InputError
from plait.model.files import CONFIG, read_base_config, weight_layout
from plait.model.ranks import is_writer
from plait.progress import note

POOLER = "pooler"
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.", "_checkpoint_wrapped_module.")
# Buffers that models once kept in their files and now compute.
_BUFFERS = ("position_ids", "inv_freq", "masked_bias")
# What transformers calls the heads that a backbone was trained with; others are asked of its classes.
_HEADS = {
    "cls", "lm_head", "classifier", "score", "qa_outputs", "classification_head", "pre_classifier", "embed_out",
    "predictions", "sop_classifier", "vocab_transform", "vocab_layer_norm", "vocab_projector", "generator_predictions",
    "generator_lm_head", "discriminator_predictions", "lm_predictions", "mask_predictions", "v_head",
}  # fmt: skip
# Fields of a config that are widths of tensors, or numbers of modules; a config that asks for more than the weights
# hold is damaged, and what it asks for would fill the memory.
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_INNER_WIDTHS = ("intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim")
_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
_POSITIONS = ("max_position_embeddings", "n_positions")
_LEARNT_POSITIONS = ("position_embeddings.weight", "wpe.weight", "embed_positions.weight")
_MAX_NAMES_IN_A_MESSAGE = 3


@dataclass(frozen=True, slots=True)
class LoadingReport:
    """What transformers says after loading.

    Args:
        missing: Parameters of the model that the files do not hold: they were drawn at random.
        unexpected: Tensors of the files that the model has no place for.
        mismatched: Parameter -> (shape in the files, shape by the config): drawn at random too.
    """

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> LoadingReport:
        """From the second value of `from_pretrained(..., output_loading_info=True)`."""
        shapes = {name: (tuple(a), tuple(b)) for name, a, b in info["mismatched_keys"]}
        return cls(frozenset(info["missing_keys"]) - shapes.keys(), frozenset(info["unexpected_keys"]), shapes)


def require_plausible(folder: Path, where: str) -> None:
    """Refuse a config that asks for far more than the weights hold, before anything of that size is made.

    Args:
        folder: The base's.
        where: The base, for messages.

    Raises:
        InputError: As `plait.model.files.read_base_config` and `weight_layout`; or a width of the config is zero or
            negative, or larger than any tensor, or there are more layers than tensors.
    """
    config, layout = read_base_config(folder), weight_layout(folder)
    inner = config.get("text_config")
    for fields in (config, inner if isinstance(inner, dict) else {}):
        for key, most in _bounds(layout).items():
            value = fields.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most):
                raise InputError(
                    f"{key} is {value!r}, and by the {plural(len(layout), 'tensor')} of the weights at most {most} makes sense",
                    where=f"{where}: {CONFIG}",
                    hint="config and weights are not of one model, or damaged: download both again",
                )


def _bounds(layout: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Field of a config -> the most that these weights can mean; generous where no tensor need be that wide."""
    widest = max((n for v in layout.values() for n in v["shape"]), default=0)
    learned = any(name.endswith(_LEARNT_POSITIONS) for name in layout)
    return {
        **dict.fromkeys(_WIDTHS, widest),
        **dict.fromkeys(_INNER_WIDTHS, max(widest, 1 << 15)),
        "vocab_size": max(widest, 1 << 19),
        **dict.fromkeys(_COUNTS, max(len(layout), 1 << 8)),
        **dict.fromkeys(_POSITIONS, max(widest, 1 << 15) if learned else 1 << 24),  # rotary ones have no tensor
    }


def require_whole(
    model: nn.Module, report: LoadingReport, heads: Collection[str], where: str, *, poolers: bool
) -> list[str]:
    """Refuse a base that was not loaded whole.

    Args:
        model: The model as it was loaded.
        report: What transformers says of it.
        heads: Top-level modules that are new on purpose: drawn anew, whatever the files hold.
        where: The base, for messages.
        poolers: Whether a pooler may be new: it belongs to the backbone, and no language model has one.

    Returns:
        Linear layers of a new pooler, to be drawn.

    Raises:
        InputError: A tensor of the backbone (or of a language model's output) is missing or of another shape, or the
            files hold tensors of no known use; each kind names its first tensors.
    """

    def is_new(name: str) -> bool:
        return name.partition(".")[0] in heads

    for name, (got, expected) in sorted(report.mismatched.items()):
        if not is_new(name):
            raise InputError(
                f"{name} is {got} in the weights and {expected} by the config",
                where=where,
                hint="config and weights are not of one model: download both again",
            )
    lacking = sorted(n for n in report.missing if not is_new(n))
    new = {n.rpartition(".")[0] for n in lacking if poolers and POOLER in n.split(".")}
    if absent := [n for n in lacking if n.rpartition(".")[0] not in new]:
        total = len(model.state_dict())
        raise InputError(
            f"{len(absent)} of {plural(total, 'tensor')} {agreed(len(absent), 'is', 'are')} missing: {_some(absent)}",
            where=where,
            hint=_cause(model, absent, report.unexpected),
        )
    if new:
        _tell(where, f"no {POOLER} in it: a new one is drawn, the same for every adapter")
    unknown = [n for n in sorted(report.unexpected) if not n.endswith(_BUFFERS)]
    unused = [n for n in unknown if _is_of_a_head(model, n)]
    if foreign := [n for n in unknown if n not in set(unused)]:
        raise InputError(
            f"holds {plural(len(foreign), 'tensor')} that the model has no place for: {_some(foreign)}",
            where=where,
            hint="config and weights are not of one model: download both again",
        )
    if unused:
        _tell(where, f"not used, of another head: {', '.join(sorted({_part(n) for n in unused}))}")
    return sorted(new)


def _is_of_a_head(model: nn.Module, name: str) -> bool:
    """Whether a tensor of the files belongs to a head (or pooler) that this model does without."""
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    parts = name.split(".")
    if POOLER in parts:
        return True
    if parts[0] == prefix or len(parts) < 2:
        return False
    backbone = getattr(model, prefix, model) if prefix else model
    if any(parts[0] == child for child, _ in backbone.named_children()):
        return False  # saved from the backbone alone, whose parts bear no prefix
    return parts[0] in _HEADS or parts[0] in _heads_of(type(model.config), model)


def _heads_of(config_class: type, model: nn.Module) -> set[str]:
    """The heads of all classes that transformers has for this kind of model, by the names of their modules."""
    return set(_children(config_class, str(model.base_model_prefix))) - {str(model.base_model_prefix)}


@functools.lru_cache(maxsize=8)
def _children(config_class: type, prefix: str) -> tuple[str, ...]:
    import torch
    from transformers.models.auto import modeling_auto

    names: list[str] = []
    for kind in ("PRETRAINING", "MASKED_LM", "CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION",
                 "QUESTION_ANSWERING", "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION"):  # fmt: skip
        mapping = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING")
        if config_class in mapping:
            with torch.device("meta"):
                names += [name for name, _ in mapping[config_class](config_class()).named_children()]
    return tuple(names)


def _cause(model: nn.Module, absent: Iterable[str], unexpected: Iterable[str]) -> str:
    """The likely reason of missing tensors, by which they are and what lies there in their place."""
    if not any(n.startswith(f"{model.base_model_prefix}.") for n in absent):
        return (
            "only its output layers are missing: a backbone alone predicts no text; use a base that was saved with them"
        )
    names = [n for n in unexpected if not _is_of_a_head(model, n)]
    wrapper = next((w for w in _WRAPPERS if names and sum(n.startswith(w) for n in names) > len(names) // 2), None)
    if wrapper:
        return f"its tensors are called {wrapper}...: saved from a wrapped model; unwrap it and save it again"
    if names:
        return f"instead it holds {_some(sorted(names))}: config and weights are not of one model"
    return "download it again, whole"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES_IN_A_MESSAGE} more" if len(names) > _MAX_NAMES_IN_A_MESSAGE else ""
    return ", ".join(names[:_MAX_NAMES_IN_A_MESSAGE]) + more


def _part(name: str) -> str:
    """The module of a head that a tensor belongs to: two levels at most."""
    return ".".join(name.split(".")[:-1][:2])


@functools.lru_cache(maxsize=256)
def _tell(where: str, what: str) -> None:
    """Say something of a base once."""
    if is_writer():
        note(f"{where}: {what}")
