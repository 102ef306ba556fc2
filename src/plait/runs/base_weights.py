"""Single weights of the base that statistics are of, for the starts that read them."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import Adapter
from plait.disk.store import read_json
from plait.errors import InputError
from plait.model.base import BaseModel, base_folder
from plait.model.identity import base_facts
from plait.model.stored import StoredTensor, base_tensors
from plait.model.stored_names import tensor_of
from plait.statistics.agreement import require_base
from plait.statistics.moments import Statistics


def base_weights(base: BaseModel, statistics: Statistics) -> Callable[[str], Float[Tensor, "out d"]]:
    """Give a function that reads a module's weight in float32, by its name relative to the backbone.

    Nothing is opened before the first weight is asked for, and one weight at a time is in memory. They are as the files have them: of a
    base that is held in four bits, those from before its rounding.

    Args:
        base: The base: a folder, or a hub name.
        statistics: Of one task on it: the modules and their shapes.

    Raises:
        InputError: At the first call: no such base, a quantised one, another than the statistics are of, or one without the weight.
    """
    task = str(statistics.provenance.get("task", "statistics"))
    named = Adapter(task, base.name, {}, prefix=str(statistics.provenance.get("backbone_prefix", "")))
    tensors: dict[str, StoredTensor] = {}

    def read(module: str) -> Tensor:
        if not tensors:
            tensors.update(_opened(base, statistics))
        info = statistics.modules[module]
        stored = tensors[tensor_of(module, named, tensors, False)[0]]
        shape = info.shape[::-1] if info.fan_in_fan_out else info.shape
        if stored.shape != tuple(shape):
            raise InputError(f"the base's weight is {stored.shape}, the statistics' {tuple(shape)}", where=module)
        W = stored.read(0, shape[0]).float()
        return W.T if info.fan_in_fan_out else W

    return read


def _opened(base: BaseModel, statistics: Statistics) -> dict[str, StoredTensor]:
    folder = base_folder(base, weights=True)
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and config.get("quantization_config"):
        hint = "collect the statistics on the full-precision base of the same weights"
        raise InputError("a quantised base: this start decomposes weights as they were", where=base.name, hint=hint)
    require_base(statistics, base.name, base_facts(base))
    return base_tensors(folder)
