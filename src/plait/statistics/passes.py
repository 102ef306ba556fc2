"""Forward passes that end as soon as nothing more is wanted from them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import InputError
from plait.statistics.masks import sent
from plait.statistics.targets import unwrapped

# What a data loader yields: name -> tensor, and whatever else it carries along
Batch = Mapping[str, Any]
_CPU = torch.device("cpu")


class Enough(Exception):  # noqa: N818
    """Raised inside a forward pass once its last wanted module has been called."""


class ForwardPasses:
    """Runs batches through a model for what its hooks see.

    Args:
        model: Wrapped or not.
        device: Where batches go; by default where the first parameter lies.
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None = None) -> None:
        self.model = model
        self.base = unwrapped(model)
        parameters = list(self.base.parameters())
        parameter = next((p for p in parameters if p.is_floating_point()), next(iter(parameters), None))
        self.device = _numbered(torch.device(device)) if device is not None else getattr(parameter, "device", _CPU)
        self.dtype = getattr(parameter, "dtype", torch.float32)
        taken = inspect.signature(self.base.forward).parameters
        self.known = {n for n, p in taken.items() if p.kind is not p.VAR_KEYWORD}
        self.encoder_decoder = bool(getattr(getattr(self.base, "config", None), "is_encoder_decoder", False))

    def prepared(self, batch: Mapping[str, Any]) -> dict[str, Tensor | bool]:
        """Select what the model takes of a batch, on its device, without labels where they only make a loss."""
        if not isinstance(batch, Mapping):
            raise InputError(f"a batch is a {type(batch).__name__}, expected a mapping from name to tensor")
        kept = {
            k: v for k, v in batch.items() if isinstance(v, Tensor) and k in self.known and self._wanted(k, v, batch)
        }
        if not kept:
            raise InputError(f"a batch holds none of the model's inputs: {', '.join(map(str, batch))}")
        extra: dict[str, Tensor | bool] = {"use_cache": False} if "use_cache" in self.known else {}
        return {k: sent(v, self.device) for k, v in kept.items()} | extra

    def _wanted(self, key: str, value: Tensor, batch: Mapping[str, Any]) -> bool:
        makes_inputs = self.encoder_decoder and value.ndim == 2 and "decoder_input_ids" not in batch
        return key != "labels" or (makes_inputs and not value.is_floating_point())

    def run(self, batch: Mapping[str, Any]) -> None:
        """Run one forward pass, perhaps ended early by `Enough`."""
        with contextlib.suppress(Enough):
            self.model(**self.prepared(batch))

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Evaluation mode, no gradients, LoRA switched off; everything back as it was afterwards."""
        training = {m for m in self.model.modules() if m.training}
        disabled = getattr(self.model, "disable_adapter", None)
        self.model.eval()
        try:
            with torch.no_grad(), disabled() if callable(disabled) else contextlib.nullcontext():
                yield
        finally:
            for module in training:
                module.training = True


def _numbered(device: torch.device) -> torch.device:
    """A GPU with its number: "cuda" and "cuda:0" are unequal."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def examples_in(batch: Batch) -> int:
    """Number of examples in a batch."""
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 0)


def first_example(batch: Batch) -> Batch:
    """Make a batch of the first example of one."""
    size = examples_in(batch)
    return {k: v[:1] if isinstance(v, Tensor) and v.ndim and v.shape[0] == size else v for k, v in batch.items()}
