"""The one way in which something is added to a live model: a forward hook a module, gone with the block.

What is added comes in three forms, each for a reason:

- one adapter (`plait.model.applied`), in float32 whatever the base's dtype: exact;
- many adapters on the rows of one batch (`plait.model.stacked`), in the base's dtype: fast;
- a function of one's own (`hooked`): weights or factors while they are learnt, inputs that are watched.

Three things are no hooks: PEFT's layers (`plait.training.peft_model`), so that an adapter is trained as other trainers would
train it; `plait.merging.per_task.TaskSwitch`, whose masked deltas have no low rank and go into the weights; and fused experts,
routers and convolutions (`plait.model.weights`), beside whose products nothing can run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from plait.border.module_names import named_by
from plait.errors import UsageError

# (a module's first input, its output) -> what it puts out instead
Change = Callable[[Tensor, Tensor], Tensor]


@contextlib.contextmanager
def hooked(changes: Iterable[tuple[nn.Module, Change]]) -> Iterator[None]:
    """Let modules put out, within the block, what a change makes of their input and output.

    >>> import torch
    >>> layer = torch.nn.Identity()
    >>> with hooked([(layer, lambda x, y: y + 2 * x)]):
    ...     layer(torch.tensor([1, 2])).tolist()
    [3, 6]
    >>> layer(torch.tensor([1, 2])).tolist()
    [1, 2]
    """
    handles = []
    try:
        for module, change in changes:
            handles.append(module.register_forward_hook(_hook(change), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(change: Change) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
    return lambda _, args, kwargs, output: change(args[0] if args else next(iter(kwargs.values())), output)


def differentiable_outputs(
    modules: Mapping[str, nn.Module], note: Callable[[str, Tensor, Tensor], None]
) -> contextlib.AbstractContextManager[None]:
    """Let gradients be asked for at what modules put out within the block, also where no parameter learns.

    Args:
        modules: The modules by name.
        note: Called at every call of a module with its name, its first input, and the output to ask at.
    """

    def noted(name: str, h: Tensor, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        note(name, h, output)
        return output

    return hooked((module, functools.partial(noted, name)) for name, module in modules.items())


def modules_named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Look modules up by the ends of their names, for a model of which nobody knows where its backbone hangs.

    >>> from torch import nn
    >>> modules_named(nn.ModuleDict({"bert": nn.ModuleDict({"query": nn.Identity()})}), ["query"])
    {'query': Identity()}

    Raises:
        UsageError: A name that no module, or more than one, ends in.
    """
    everything = list(model.named_modules())
    modules: dict[str, nn.Module] = {}
    for name in names:
        hits = [m for n, m in everything if named_by(n, name)]
        if len(hits) != 1:
            raise UsageError(f"{len(hits)} modules of the model are named {name!r}, expected one")
        modules[name] = hits[0]
    return modules
