"""Tensors beside the factors of a PEFT folder: what the config makes of each; what it does not speak of is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plait.adapters.arrays import equal
from plait.adapters.config import CLASSIFICATION_TYPES, CONFIG, AdapterConfig
from plait.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING_NAMES = {"embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "wpe", "position_embeddings"}
OUTPUT_NAMES = {"lm_head", "embed_out", "output"}
# Whisper's, and BERT's and its kin's: other models have other layers of these names.
TIED_OUTPUT_NAMES = OUTPUT_NAMES | {"proj_out", "decoder"}
HEAD_NAMES = {"classifier", "score", "classification_head", "qa_outputs", "pre_classifier"}
COPY = ".base_layer."
# Piece of a name -> what it gives away where the config does not say so.
_SIGNS = {
    "lora_magnitude_vector": "a magnitude of DoRA, and use_dora is not set",
    "lora_B.bias": "a bias of B, and lora_bias is not set",
    "lora_A.bias": "a bias of A, and lora_bias is not set",
    "trainable_tokens_delta": "trained tokens, and trainable_token_indices names none",
    "original_module": "a base's weight from a state dict that PEFT did not save",
    "vera_lambda": "VeRA's, and peft_type is LORA",
    "lora_C": "no factor of LoRA",
    "lora_": "no factor of LoRA",
}


@dataclass(frozen=True, slots=True)
class Beside:
    """What lies beside the factors, by name.

    Args:
        head: A classifier's own tensors.
        whole: Weights that were trained whole.
        copies: The base's own weights under an adapted embedding or output layer, as PEFT saves them: not trained.
        saved: Names for `modules_to_save`: PEFT keeps the weights they name apart from the base's. Whole weights without
            such a name take the place of the base's when PEFT loads them.
    """

    head: dict[str, Tensor]
    whole: dict[str, Tensor]
    copies: dict[str, Tensor]
    saved: tuple[str, ...]


def require_filled(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors without a single number.

    Raises:
        InputError: One is empty; it is named, with how to save again.
    """
    if empty := next((k for k, t in tensors.items() if t.numel() == 0), None):
        raise InputError(
            f"tensor {empty!r} is empty, of shape {tuple(tensors[empty].shape)}: its trained values were not saved",
            where=where,
            hint="trainers that split parameters (DeepSpeed ZeRO-3, FSDP) gather them before saving: "
            "stage3_gather_16bit_weights_on_model_save, or save_pretrained(state_dict=accelerator.get_state_dict(model))",
        )


def sorted_beside(others: Mapping[str, Tensor], config: AdapterConfig, where: str) -> Beside:
    """Say of each tensor that is no factor what it is.

    Args:
        others: Name, as in the model -> tensor.
        config: The folder's.
        where: Names the folder in errors.

    Raises:
        InputError: A tensor of which the config does not speak, or a name in modules_to_save without a tensor.
    """
    head: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    saved: set[str] = set()
    classifier = config.task_type in CLASSIFICATION_TYPES
    for key, tensor in _saved_once(others, where).items():
        parts = key.split(".")[:-1]
        declared = declared_by(key, config.modules_to_save)
        vocabulary = key.endswith(".weight") and parts[-1:] and parts[-1] in EMBEDDING_NAMES | OUTPUT_NAMES
        if COPY in key:
            copies[key] = tensor
        elif classifier and not vocabulary and (declared or HEAD_NAMES & set(parts)):
            head[key] = tensor
        elif declared or (vocabulary and config.weight_tying):
            whole[key] = tensor
            saved.add(declared or parts[-1])
        elif vocabulary:
            whole[key] = tensor
        else:
            _refuse(key, where)
    _require_saved(config, others, where)
    return Beside(head, whole, copies, tuple(sorted(saved)))


def _saved_once(others: Mapping[str, Tensor], where: str) -> Mapping[str, Tensor]:
    """Leave out what PEFT saves beside a module kept whole, where the vocabulary was resized: its weight once more, and the base's.

    Raises:
        InputError: The two are not one.
    """
    kept = dict(others)
    for key in others:
        once, own = key.replace(".modules_to_save.", ".", 1), key.replace(".original_module.", ".", 1)
        if once != key and once in others:
            if not equal(kept.pop(key), others[once]):
                raise InputError(f"{key!r} and {once!r} differ, and PEFT loads the second alone", where=where)
        elif own != key and own in others:
            del kept[key]
    return kept


def declared_by(key: str, names: Sequence[str]) -> str | None:
    """The name in modules_to_save that a tensor belongs to: a module around it ends in that name, as PEFT has it."""
    parts = key.split(".")[:-1]
    around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return next((name for name in names if any(module.endswith(name) for module in around)), None)


def no_matrix(whole: Mapping[str, Tensor]) -> str | None:
    """The first of these weights whose change no low-rank update can be: a norm's, a bias; None where all are matrices."""
    return next((key for key, tensor in whole.items() if tensor.ndim != 2 or not key.endswith(".weight")), None)


def undeclared(whole: Iterable[str], saved: Sequence[str]) -> list[str]:
    """Those weights that no name in modules_to_save declares."""
    return [key for key in whole if declared_by(key, saved) is None]


def _refuse(key: str, where: str) -> None:
    sign = next((why for piece, why in _SIGNS.items() if piece in key), None)
    raise InputError(
        f"{CONFIG} does not speak of tensor {key!r}" + (f": {sign}" if sign else ""),
        where=where,
        hint="the config of another adapter?" if sign else "modules_to_save names what was trained whole",
    )


def _require_saved(config: AdapterConfig, others: Mapping[str, Tensor], where: str) -> None:
    """A classifier's usual names stand in every such config, whether the model has them or not."""
    for name in config.modules_to_save:
        if name not in HEAD_NAMES and not any(declared_by(key, [name]) for key in others):
            raise InputError(
                f"modules_to_save names {name!r}, and the file holds no tensor of it: what was trained there is missing",
                where=where,
                hint=f"save again with the whole state dict; if nothing was trained there, take the name out of {CONFIG}",
            )
