"""What a task's model does before and after its backbone, for many members whose backbone ran once, together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from plait.model.base import backbone_of
from plait.model.stacked import by_member


class _ReachedError(Exception):
    """Raised where a task's model calls its backbone."""

    def __init__(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.call = args, options


class _Gate(nn.Module):
    """Stands in for the backbone: stops the call there, or answers it with an output computed before."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.output: Any = None
        self.config = getattr(backbone, "config", None)

    def forward(self, *args: Any, **options: Any) -> Any:
        if self.output is None:
            raise _ReachedError(args, options)
        return self.output


class Ends:
    """The two ends of a task's model around its backbone, as the architecture's own code has them.

    Whatever a model does with its inputs before the backbone (T5's shifted decoder inputs) and with the backbone's
    output afterwards (pooling, the last token, a dense layer, a soft cap) is run, not imitated.

    Args:
        view: A task's model, its backbone shared with others; see `plait.model.views.task_view`.
    """

    def __init__(self, view: nn.Module) -> None:
        self.backbone, prefix = backbone_of(view)
        self._gate = _Gate(self.backbone)
        self._view = view
        setattr(view, prefix, self._gate)

    def backbone_call(self, inputs: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Find the arguments with which the model would call its backbone on these inputs."""
        self._gate.output = None
        try:
            self._view(**inputs, use_cache=False) if _takes_cache(self._view) else self._view(**inputs)
        except _ReachedError as reached:
            return reached.call
        raise RuntimeError("the model did not call its backbone")

    def logits(self, output: Any, inputs: Mapping[str, Tensor], head: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits from a backbone's output, with these head tensors in place of the model's own."""
        self._gate.output = output
        result = functional_call(self._view, dict(head or {}), kwargs=dict(inputs))
        return result.logits  # type: ignore[no-any-return]

    def stacked_logits(self, output: Any, inputs: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> Tensor:
        """Logits (members, b, ...) of members with heads of one shape.

        Args:
            output: The backbone's, for members * b rows.
            inputs: Tensors of members * b rows.
            heads: Head tensors (members, *shape).
        """
        members = next(iter(heads.values())).shape[0]
        parts = {k: by_member(v, members) for k, v in output.items() if isinstance(v, Tensor)}
        rows = {k: by_member(v, members) for k, v in inputs.items()}

        def one(head: dict[str, Tensor], part: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
            return self.logits(type(output)(**part), row, head)

        if _data_dependent(self._view):
            each = [one(*(_at(d, i) for d in (heads, parts, rows))) for i in range(members)]
            return torch.stack(each)
        return vmap(one)(dict(heads), parts, rows)


def _at(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {k: v[index] for k, v in tensors.items()}


def _takes_cache(view: nn.Module) -> bool:
    return bool(getattr(getattr(view, "config", None), "use_cache", False))


def _data_dependent(view: nn.Module) -> bool:
    """T5 picks the rows of the end token by a mask, whose size vmap cannot know."""
    return bool(getattr(getattr(view, "config", None), "is_encoder_decoder", False))
