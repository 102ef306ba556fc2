"""Single weights of a base model's folder, as (out, in) matrices, for conversions that need them."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import Adapter
from plait.errors import InputError
from plait.model.stored import StoredTensor, base_tensors, require_unquantised
from plait.model.stored_names import tensor_of

OUTPUT = "lm_head"  # what every causal model of transformers calls its output layer


class BaseWeights:
    """A base's folder, read one weight at a time.

    Args:
        folder: Local, in safetensors, not quantised.
        adapter: Whose module names are looked up.
    """

    def __init__(self, folder: Path, adapter: Adapter) -> None:
        self.adapter = adapter
        config = require_unquantised(folder)
        text = config.get("text_config")
        inner = text.get("tie_word_embeddings", False) if isinstance(text, dict) else False
        self.tied = bool(config.get("tie_word_embeddings", inner))
        self.tensors = base_tensors(folder)

    def stored(self, module: str) -> StoredTensor:
        """Where a module's weight lies.

        Raises:
            InputError: Nowhere in this base.
        """
        return self.tensors[tensor_of(module, self.adapter, self.tensors, self.tied)[0]]

    def matrix(self, module: str, shape: tuple[int, int], *, embedding: bool = False) -> Float[Tensor, "out in"]:
        """A module's weight in float32, as (out, in): Conv1D and embeddings transposed, kernels flattened.

        Raises:
            InputError: Not of this shape.
        """
        stored = self.stored(module)
        W = stored.read(0, stored.shape[0]).float()
        W = W.reshape(W.shape[0], -1) if W.ndim > 2 else W
        if embedding or (self.adapter.fan_in_fan_out and W.shape == (shape[1], shape[0])):
            W = W.T
        if tuple(W.shape) != tuple(shape):
            raise InputError(
                f"{module!r} has a delta {tuple(shape)} and the base a weight {stored.shape}", where=str(stored.file)
            )
        return W
