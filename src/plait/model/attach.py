"""Running a base model with deltas of our own added to its modules, for the methods that need forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from plait.adapters.lora import LoraFactors
from plait.errors import UsageError

# x (.., in) -> what is added to the module's output (.., out)
Extra = Callable[[Tensor], Tensor]
# Called with the module's input.
Watch = Callable[[Tensor], None]


def found_modules(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The model's modules by their names relative to the backbone.

    Raises:
        UsageError: A name that no module, or more than one, ends in.
    """
    known = list(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name in names:
        hits = [m for n, m in known if n == name or n.endswith(f".{name}")]
        if len(hits) != 1:
            raise UsageError(f"{len(hits)} modules of the model are named {name!r}, expected one")
        found[name] = hits[0]
    return found


def low_rank(factors: LoraFactors) -> Extra:
    """X -> B (A x) for a fixed delta."""
    f = factors.folded()
    return lambda x: ((x.to(f.A.dtype) @ f.A.T) @ f.B.T).to(x.dtype)


@contextmanager
def attached(
    modules: Mapping[str, nn.Module], extras: Mapping[str, Extra], watched: Mapping[str, Watch] | None = None
) -> Iterator[None]:
    """While open, every module with an extra adds it to its output; every watched one shows its input first."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def run(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if watched and name in watched:
                watched[name](inputs[0])
            return output + extras[name](inputs[0]) if name in extras else output

        return run

    wanted = [n for n in modules if n in extras or (watched and n in watched)]
    handles = [modules[n].register_forward_hook(hook(n)) for n in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
