"""Running a model in groups of layers: each layer once for all batches, with only one group's weights on the device.

The stacks of layers (outermost ModuleLists) are cut into groups. While one group runs, the layers before it are replaced
by what the last of them returned for the same batch, and the pass ends after the group. So a model is walked through
once however many groups there are, and its own forward function still prepares masks, positions and embeddings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.statistics.passes import Enough, ForwardPasses
from plait.statistics.targets import Target


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that run together.

    Args:
        stack: Number of the stack.
        start, stop: Layers [start, stop) of it; all are empty for the tail.
        targets: Names of the target modules inside.
    """

    stack: int
    start: int
    stop: int
    targets: tuple[str, ...]


class LayerWalk:
    """Walks a model group by group.

    Args:
        passes: Runs batches; its device is where layers compute.
        targets: The target modules.
        size: Layers in a group.

    Weights that lie elsewhere than the device are brought there for their group and let go afterwards.
    """

    def __init__(self, passes: ForwardPasses, targets: Mapping[str, Target], size: int) -> None:
        self.passes = passes
        self.stacks = _stacks(passes.base, targets)
        self.groups = _groups(self.stacks, targets, size)
        self._returned: dict[tuple[int, int], Any] = {}

    @contextlib.contextmanager
    def group(self, group: LayerGroup) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
        """Yield a function that runs one batch, given its number, through the group."""
        batch = [0]
        stacked = {id(m) for stack in self.stacks for layer in stack for m in layer.modules()}
        rest = [m for m in self.passes.base.modules() if id(m) not in stacked]
        running = self.stacks[group.stack][group.start : group.stop]
        inside = [m for layer in running for m in layer.modules()]

        def run(number: int, inputs: Mapping[str, Any]) -> None:
            batch[0] = number
            self.passes.run(inputs)

        with contextlib.ExitStack() as stack:
            stack.enter_context(on_device([*rest, *inside], self.passes.device))
            for number, layer in self._skipped(group):
                stack.enter_context(_replaced(layer, lambda *_a, n=number, **_k: self._returned[n, batch[0]]))
            if running:
                stack.enter_context(self._ends_after(running[-1], group, batch))
            yield run

    def _skipped(self, group: LayerGroup) -> Iterator[tuple[int, nn.Module]]:
        for number, stack in enumerate(self.stacks[: group.stack + 1]):
            stop = group.start if number == group.stack else len(stack)
            yield from ((number, layer) for layer in stack[:stop])

    @contextlib.contextmanager
    def _ends_after(self, layer: nn.Module, group: LayerGroup, batch: list[int]) -> Iterator[None]:
        def keep(_m: nn.Module, _a: Any, output: Any) -> None:
            self._returned[group.stack, batch[0]] = output
            raise Enough

        handle = layer.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()


def _stacks(base: nn.Module, targets: Mapping[str, Target]) -> list[list[nn.Module]]:
    """The outermost ModuleLists that hold targets, in the model's order."""
    wanted = {id(t.module) for t in targets.values()}
    blocks: list[list[nn.Module]] = []
    taken: set[int] = set()
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in taken:
            inner = [m for layer in module for m in layer.modules()]
            taken |= {id(m) for m in inner}
            if any(id(m) in wanted for m in inner):
                blocks.append(list(module))
    return blocks


def _groups(stacks: Sequence[Sequence[nn.Module]], targets: Mapping[str, Target], size: int) -> list[LayerGroup]:
    groups = []
    placed: set[str] = set()
    for number, stack in enumerate(stacks):
        for start in range(0, len(stack), size):
            stop = min(start + size, len(stack))
            inside = {id(m) for layer in stack[start:stop] for m in layer.modules()}
            names = tuple(n for n, t in targets.items() if id(t.module) in inside)
            placed |= set(names)
            groups.append(LayerGroup(number, start, stop, names))
    while groups and not groups[-1].targets:
        groups.pop()
    outside = tuple(n for n in targets if n not in placed)
    if outside:  # in a head or a projection after the layers: the pass runs on to the end
        last = len(stacks) - 1
        groups.append(LayerGroup(last, len(stacks[last]) if stacks else 0, len(stacks[last]) if stacks else 0, outside))
    return groups


@contextlib.contextmanager
def _replaced(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward function for the time being."""
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


@contextlib.contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Own parameters and buffers of modules on a device; those that lay elsewhere go back without being copied."""
    moved: list[tuple[Tensor, Tensor]] = []
    for module in modules:
        own: list[Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for tensor in own:
            if tensor.device != device:
                moved.append((tensor, tensor.data))
                tensor.data = tensor.data.to(device, non_blocking=True)
    try:
        yield
    finally:
        for tensor, before in moved:
            tensor.data = before
