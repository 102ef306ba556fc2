"""The weights of a model's linear layers, in full precision, in four bits, with adapters baked in; given to it for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from plait.adapters.lora import LINEAR, Adapter
from plait.errors import InputError
from plait.model.applied import resolve
from plait.model.base import backbone_of
from plait.model.four_bits import linear_layers, rounded, stored_dtype
from plait.model.layers import linear_shape, stored_flipped

# A layer -> its weight.
Weights = Mapping[nn.Module, Tensor]


class Held:
    """A loaded model whose linear layers are given other weights within a block.

    Args:
        model: The model, in full precision or unpacked.
        folder: Where it was loaded from.
        adapters: What may be baked in.
        double: Whether four bits are quantised twice, as QLoRA has it.

    Raises:
        InputError: A module of an adapter is not in the model, or no linear layer.
    """

    def __init__(self, model: nn.Module, folder: Path, adapters: Sequence[Adapter], *, double: bool = True) -> None:
        self.model, self.double, self.stored = model, double, stored_dtype(folder)
        self.quantised = [module for module, _ in linear_layers(model, backbone_of(model)[0])]
        self.places = {a.name: self._places(a) for a in adapters}
        others = {m: None for places in self.places.values() for m in places.values()}
        self.full: Weights = {m: m.weight.detach() for m in dict.fromkeys([*self.quantised, *others])}

    def _places(self, adapter: Adapter) -> Mapping[str, Any]:
        places = {m: resolve(self.model, m, adapter.prefix) for m in adapter.modules}
        if odd := next((m for m, layer in places.items() if linear_shape(layer) is None), None):
            raise InputError("no linear layer: only those are baked here", where=odd)
        if odd := next((m for m, f in adapter.modules.items() if f.kind != LINEAR), None):
            raise InputError("no plain linear layer of the adapter: only those are baked here", where=odd)
        return places

    def in_four_bits(self, weights: Weights) -> Weights:
        """Quantise and unpack what QLoRA quantises; the other weights stay."""
        four = set(self.quantised)
        return {m: rounded(m, W, self.stored, double=self.double) if m in four else W for m, W in weights.items()}

    def baked(self, weights: Weights, adapter: Adapter) -> Weights:
        """Add an adapter to weights, rounded to the type that the base is stored in."""
        result = dict(weights)
        for name, layer in self.places[adapter.name].items():
            f = adapter.modules[name].folded(device=weights[layer].device)
            delta: Float[Tensor, "out in"] = f.B @ f.A
            W = weights[layer]
            if stored_flipped(layer):
                delta = delta.T
            if delta.shape != W.shape:
                raise InputError(f"the update is {tuple(delta.shape)}, the weight {tuple(W.shape)}", where=name)
            result[layer] = (W + delta).to(self.stored).to(W.dtype)
        return result

    @contextlib.contextmanager
    def giving(self, weights: Weights) -> Iterator[None]:
        """Within the block, the layers have these weights; what shares a weight with one of them does not change."""
        own: dict[nn.Module, nn.Parameter | None] = {m: m._parameters["weight"] for m in weights}
        for module, weight in weights.items():
            if weight is not own[module]:
                module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        try:
            yield
        finally:
            for module, parameter in own.items():
                module._parameters["weight"] = parameter
