"""What a tensor of a PEFT file is, by its name: which half of which module's factors, or what else."""

from __future__ import annotations

import re
from typing import NamedTuple

ROOT = "base_model.model."
A, B, EMBEDDING_A, EMBEDDING_B = "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"
MAGNITUDE, BIAS_OF_B, TOKENS, VELORA, COPY, PARAMETER = (
    "magnitude",
    "bias of lora_B",
    "trained tokens",
    "direction of VeLoRA's backward pass",
    "copy of a base weight",
    "parameter",
)
HALVES = {A: B, B: A, EMBEDDING_A: EMBEDDING_B, EMBEDDING_B: EMBEDDING_A}
_SUFFIXES = {
    f".{A}.weight": A,
    f".{B}.weight": B,
    f".{EMBEDDING_A}": EMBEDDING_A,
    f".{EMBEDDING_B}": EMBEDDING_B,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    f".{B}.bias": BIAS_OF_B,
    ".token_adapter.trainable_tokens_delta": TOKENS,
    ".lora_velora_embed": VELORA,
    ".base_layer.weight": COPY,
    ".base_layer.bias": COPY,
}
_NAMED = re.compile(rf"\.({A}|{B}|{EMBEDDING_A}|{EMBEDDING_B})\.(?!weight$|bias$)(\w+)(\.weight)?$")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module", "base_model")
# The last part of a name that is looked up in, not multiplied with; and of one that is multiplied with whatever it is called.
_EMBEDDINGS = "embed_tokens word_embeddings wte wpe shared position_embeddings token_type_embeddings"
_MORE = "embed_positions tok_embeddings"
LOOKED_UP = frozenset([*_EMBEDDINGS.split(), *_MORE.split()])
_MULTIPLIED = re.compile(
    r"(lm_head|.*(proj|query|key|value|dense|fc\d?|linear|lin\d?|out|_[qkvo]|attn)|[qkvo]|w[io](_\d)?|w[123]|score|classifier|decoder)$"
)


class Named(NamedTuple):
    """A tensor's name, taken apart.

    Args:
        module: The module it belongs to, as the base names it; of a parameter, its own name.
        kind: What it is.
        adapter: The adapter's name where it was left in, as in ``lora_A.default.weight``; "" otherwise.
        rooted: Whether it starts as PEFT's names do.
    """

    module: str
    kind: str
    adapter: str
    rooted: bool


def named(tensor: str) -> Named:
    """Take a tensor's name apart."""
    rooted = tensor.startswith(ROOT)
    rest = tensor[len(ROOT) :] if rooted else tensor
    if inner := _NAMED.search(rest):
        return Named(rest[: inner.start()], inner[1], inner[2], rooted)
    for suffix, kind in _SUFFIXES.items():
        if rest.endswith(suffix):
            return Named(rest[: -len(suffix)], kind, "", rooted)
    return Named(rest, PARAMETER, "", rooted)


def wrapper_in(module: str) -> str:
    """The name of a training wrapper that stands in a module's name, "" where there is none."""
    parts = module.split(".")
    return next((w for w in WRAPPERS if (parts[0] == w if w in ("module", "base_model") else w in parts)), "")


def is_looked_up(module: str) -> bool | None:
    """Whether a module is an embedding, by the last part of its name; None where that does not tell."""
    last = module.rpartition(".")[2]
    if last in LOOKED_UP:
        return True
    return False if _MULTIPLIED.fullmatch(last) and "emb" not in last else None


def parameter_of(name: Named) -> str:
    """What PEFT calls the parameter that a tensor becomes where its module has factors or tokens of its own.

    The adapter goes by PEFT's name for the first one of a model, "default".
    """
    inner = {
        A: f"{A}.default.weight",
        B: f"{B}.default.weight",
        EMBEDDING_A: f"{EMBEDDING_A}.default",
        EMBEDDING_B: f"{EMBEDDING_B}.default",
        MAGNITUDE: "lora_magnitude_vector.default.weight",
        BIAS_OF_B: f"{B}.default.bias",
        TOKENS: "token_adapter.trainable_tokens_delta.default",
        VELORA: "lora_velora_embed.default",
        COPY: "base_layer.weight",
    }
    return f"{ROOT}{name.module}.{inner[name.kind]}"
