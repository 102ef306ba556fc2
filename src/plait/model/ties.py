"""What else of a base is its input embedding: mostly the output layer, as transformers ties them and as the files have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.errors import InputError
from plait.model.base import BaseModel, load_config
from plait.model.layout import layout_in, model_without_weights
from plait.model.stored import StoredTensor
from plait.model.stored_names import embeddings_in

# What most models call these; of one that transformers does not know nothing else can be told.
_EMBEDDING, _OUTPUT = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Ties:
    """What a base's input embedding is one tensor with.

    Args:
        embedding: Its tensor in the files; "" where they hold none, or it cannot be told.
        parameter: The name of its weight in the model.
        output: The name of the output layer's weight in the model, where both are tied.
        apart: The tensor of the output layer where the files hold both all the same: each takes its own updates.
        others: What else is the embedding and not in the files: an encoder's, a decoder's.
        along: What else the same flag of the config ties, a decoder's bias say: parameter that the files do not hold -> the tensor
            that it is one with. Where the flag is off, loaders begin it anew.
    """

    embedding: str = ""
    parameter: str = ""
    output: str | None = None
    apart: str | None = None
    others: tuple[str, ...] = ()
    along: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_one(self) -> bool:
        """Whether the output layer has no tensor but the embedding's."""
        return self.output is not None and self.apart is None


def ties_of(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Ties:
    """Tell what is tied to a base's input embedding.

    transformers is asked, whose classes know what a config leaves out: files of its version 4 say nothing where they tie, as those of
    GPT-2, Gemma and OPT do. A model that it does not know goes by what the config says.

    Args:
        folder: The base's.
        config: Its config.json.
        tensors: Those of its files, by name.

    Cost: transformers is imported, and the model made without weights.
    """
    model = _model(folder)
    if model is None:
        names = embeddings_in(tensors)
        kept = {_EMBEDDING: names[0]} if len(names) == 1 else {}
        kept |= {_OUTPUT: _OUTPUT} if _OUTPUT in tensors else {}
        embedding, output, tied = _EMBEDDING, _OUTPUT, [_OUTPUT] if _says_tied(folder, config) else []
        pairs: list[tuple[str, str]] = []
    else:
        layout = layout_in(model, list(tensors))
        kept = {p: s.parts[0][0] for p, s in layout.items() if s.unknown is None and len(s.parts) == 1}
        pairs = list(model.get_expanded_tied_weights_keys(all_submodels=True).items())
        embedding, output, tied = _tied_weights(model, pairs)
    own = kept.get(embedding, "")
    others = tuple(name for name in tied if name != output and name not in kept)
    if output not in tied:
        return Ties(own, embedding, others=others)
    along = {
        a: kept[b] for pair in pairs for a, b in (pair, pair[::-1]) if a not in {embedding, *tied, *kept} and b in kept
    }
    return Ties(own, embedding, output, kept.get(output), others, along)


def require_one_output(ties: Ties, where: str) -> None:
    """Refuse an embedding that is more than the output layer: no copy of the files keeps its places apart.

    Raises:
        InputError: Names them.
    """
    if ties.others:
        raise InputError(
            f"the base's embedding is one tensor with {' and '.join(ties.others)}, of which PEFT changes one alone",
            where=where,
            hint="serve the adapter on its base, or leave its update of the embedding and the output layer out",
        )


def _model(folder: Path) -> Any:
    try:
        return model_without_weights(folder)
    except InputError:  # a config that needs code of others
        return None


def _tied_weights(model: Any, pairs: list[tuple[str, str]]) -> tuple[str, str, list[str]]:
    """Names of the weights of input embedding and output layer, and of all that are one with the first by these pairs."""
    names = {id(m): f"{n}.weight" for n, m in model.named_modules()}
    embedding, output = (names.get(id(_end(model, which)), "") for which in ("input", "output"))
    same = {embedding}
    for _ in pairs:
        same |= {name for pair in pairs if {*pair} & same for name in pair}
    return embedding, output, sorted(same - {embedding})


def _end(model: Any, which: str) -> Any:
    try:
        return getattr(model, f"get_{which}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None


def _says_tied(folder: Path, config: Mapping[str, Any]) -> bool:
    """By the config as transformers reads it, else as it stands."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings", False) if isinstance(text, Mapping) else False
    said = config.get("tie_word_embeddings", inner)
    try:
        return bool(getattr(load_config(BaseModel(str(folder))), "tie_word_embeddings", said))
    except InputError:
        return bool(said)
