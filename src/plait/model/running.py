"""In which order a model runs some of its modules, and running it no further than is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.errors import UsageError
from plait.model.hooks import Change, hooked


class _EnoughError(Exception):
    """What was asked for has run."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Modules that read one tensor, one after the other.

    Args:
        modules: Their names.
        calls: How often one pass runs them, together.
    """

    modules: tuple[str, ...]
    calls: int


def stages_of(modules: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[Stage]:
    """Say in which order one pass runs modules, those that read one tensor (q, k and v) together.

    Args:
        modules: Names and modules.
        run: One forward pass.

    Raises:
        UsageError: A module that the pass does not run.
    """
    calls: list[str] = []
    groups: list[list[str]] = []
    last: Tensor | None = None

    def note(name: str) -> Change:
        def unchanged(x: Tensor, output: Tensor) -> Tensor:
            nonlocal last
            if name not in calls:
                if not groups or x is not last:
                    groups.append([])
                groups[-1].append(name)
                last = x
            calls.append(name)
            return output

        return unchanged

    with torch.no_grad(), hooked((module, note(name)) for name, module in modules.items()):
        run()
    if idle := [m for m in modules if m not in calls]:
        raise UsageError(f"the model never ran {idle[0]!r}")
    return [Stage(tuple(group), sum(map(calls.count, group))) for group in groups]


def run_until(
    stage: Stage, modules: Mapping[str, nn.Module], changes: Mapping[str, Change], run: Callable[[], Any]
) -> None:
    """Run a pass without gradients, changed, until the last module of a stage has put out what it does.

    Args:
        stage: Its modules are among those changed.
        modules: Names and modules.
        changes: Name -> what the module puts out instead.
        run: One forward pass.
    """
    left = stage.calls

    def counting(change: Change) -> Change:
        def counted(x: Tensor, output: Tensor) -> Tensor:
            nonlocal left
            changed = change(x, output)
            left -= 1
            if not left:
                raise _EnoughError
            return changed

        return counted

    watched = {m: counting(c) if m in stage.modules else c for m, c in changes.items()}
    with torch.no_grad(), hooked((modules[m], c) for m, c in watched.items()), contextlib.suppress(_EnoughError):
        run()


def real_rows(h: Float[Tensor, "... d"], mask: Tensor | None) -> Float[Tensor, "n d"]:
    """A layer's rows without those of padding.

    Args:
        h: Inputs or outputs, (examples, length, d) or any other shape.
        mask: (examples, length), true at real tokens; where it fits no row of h, all rows are real.
    """
    fits = mask is not None and h.ndim == 3 and mask.shape == h.shape[:2]
    return h[mask.bool()] if fits and mask is not None else h.reshape(-1, h.shape[-1])
