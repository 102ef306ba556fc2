"""Single weights of a base model's folder, as (out, in) matrices, for conversions that need them."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.beside import TIED_OUTPUT_NAMES
from plait.adapters.config import CLASSIFICATION_TYPES, MERGED_TYPE
from plait.adapters.lora import Adapter
from plait.errors import InputError
from plait.model.conv1d import is_turned
from plait.model.stored import StoredTensor, base_tensors, require_unquantised
from plait.model.stored_names import all_named, tensor_of, without_wrappers
from plait.model.ties import Ties, require_one_output, ties_of

_WITHOUT_OUTPUT = {*CLASSIFICATION_TYPES, MERGED_TYPE}  # task types of models that give no token


class BaseWeights:
    """A base's folder, read one weight at a time.

    Args:
        folder: Local, in safetensors, not quantised.
        adapter: Whose module names are looked up.
    """

    def __init__(self, folder: Path, adapter: Adapter) -> None:
        self.adapter = adapter
        self.folder = folder
        self.config = require_unquantised(folder)
        self.tensors = base_tensors(folder)
        if not all_named(adapter, self.tensors):  # of another version of transformers
            from plait.model.layout import known_names, layout_of_names

            self.tensors = known_names(self.tensors, layout_of_names(folder, self.tensors))

    @functools.cached_property
    def _ties(self) -> Ties:
        return ties_of(self.folder, self.config, self.tensors)

    @property
    def tied(self) -> bool:
        """Whether the output layer is the input embedding, and has no tensor of its own."""
        return self._ties.is_one

    def output_of(self, module: str) -> str | None:
        """The output layer that changes with an embedding: one tensor with it, or an equal one, which transformers ties.

        Args:
            module: An embedding that the adapter changes, by the name that it has in the adapter's model.

        Returns:
            Its name; None where there is none, or the adapter's model has no output layer.

        Raises:
            InputError: More than the output layer changes.
        """
        if self.adapter.task_type in _WITHOUT_OUTPUT:
            return None
        ties = self._ties
        if without_wrappers(f"{module}.weight") != without_wrappers(ties.parameter):
            return None
        require_one_output(ties, str(self.folder))
        if ties.apart and ties.embedding:
            one, other = (t.read(0, t.shape[0]) for t in (self.tensors[ties.embedding], self.tensors[ties.apart]))
            if not torch.equal(one, other):
                return None
        return ties.output and ties.output.removesuffix(".weight")

    def stored(self, module: str) -> StoredTensor:
        """Where a module's weight lies.

        Raises:
            InputError: Nowhere in this base.
        """
        tied = module.rpartition(".")[2] in TIED_OUTPUT_NAMES and self.tied
        return self.tensors[tensor_of(module, self.adapter, self.tensors, tied)[0]]

    def matrix(self, module: str, shape: tuple[int, int], *, embedding: bool = False) -> Float[Tensor, "out in"]:
        """A module's weight in float32, as (out, in): Conv1D and embeddings transposed, kernels flattened.

        Raises:
            InputError: Not of this shape.
        """
        stored = self.stored(module)
        W = stored.read(0, stored.shape[0]).float()
        W = W.reshape(W.shape[0], -1) if W.ndim > 2 else W
        kind = self.config.get("model_type")
        if embedding or is_turned(kind, self.adapter.fan_in_fan_out, shape, tuple(W.shape)):
            W = W.T
        if tuple(W.shape) != tuple(shape):
            raise InputError(
                f"{module!r} has a delta {tuple(shape)} and the base a weight {stored.shape}", where=str(stored.file)
            )
        return W
