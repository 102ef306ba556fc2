"""AdaMerging: weights per task and module that make the merged model's predictions certain. Needs the base and inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import RunError, UsageError
from plait.merging.align import assembled
from plait.merging.plan import Plan
from plait.merging.planning import plan_merge
from plait.merging.record import Merged
from plait.model.hooks import Change, hooked, modules_named

Batch = Mapping[str, Tensor]


def adamerging(
    adapters: Sequence[Adapter],
    model: nn.Module,
    forward: Callable[[str, Batch], Float[Tensor, "n classes"]],
    batches: Mapping[str, Sequence[Batch]],
    *,
    init: float = 0.3,
    learning_rate: float = 1e-3,
    steps: int = 500,
    layerwise: bool = True,
    clamp: bool = True,
    base: str | None = None,
    name: str = "merged",
) -> Merged:
    """Minimise the entropy of the predictions over the weights l_{t,m} of D_m = sum_t l_{t,m} D_{t,m}.

    Each step takes one batch of every task, adds up the mean entropies of softmax(logits), and moves the weights by Adam.

    Args:
        adapters: At least one.
        model: The base; its modules are found by name, and it is left as it was.
        forward: (task, batch) -> logits, through `model` and the task's own head. Classifiers only: entropy of a
            language model's next token says little about a task.
        batches: Task -> unlabelled batches, taken in turn.
        init: First value of every weight.
        learning_rate: Of Adam.
        steps: How many.
        layerwise: One weight per task and module; else one per task.
        clamp: Use every weight cut to [0, 1] in each pass, as the authors' code does and the paper does not say; one that has left
            it no longer moves.
        base: Base id of the result where the adapters name one base by different names.
        name: Of the result.

    Returns:
        The merge, exact at rank R; the record's options hold the weights by task and module, and the first and last loss.

    Raises:
        UsageError: No batches for a task, or modules the model does not have.
        RunError: A loss that is not finite.

    Cost:
        `steps` forward and backward passes of one batch per task.
    Source: Yang et al., ICLR 2024 (arXiv:2310.02575), section 3.2.2.
    **Deviates**: only the adapters' modules are merged, so those are the "layers".
    """
    plan = plan_merge(adapters, "task_arithmetic", scale=1.0, base=base)
    tasks = [a.name for a in plan.adapters]
    if lacking := [t for t in tasks if not batches.get(t)]:
        raise UsageError(f"no batches for {', '.join(lacking)}")
    modules = modules_named(model, list(plan.common.modules))
    shape = (len(tasks), len(modules) if layerwise else 1)
    weights = torch.full(shape, init, dtype=torch.float32, requires_grad=True)

    def used() -> Tensor:
        return weights.clamp(0.0, 1.0) if clamp else weights

    losses = _descend(
        plan, modules, weights, used, forward, {t: cycle(batches[t]) for t in tasks}, learning_rate, steps
    )
    final = used().detach().expand(len(tasks), len(modules))
    merged: dict[str, LoraFactors] = {}
    for i, module in enumerate(plan.common.modules):
        merged[module] = plan.view(module).combination(final[:, i].tolist())
    options = {"init": init, "learning_rate": learning_rate, "steps": steps, "layerwise": layerwise, "clamp": clamp}
    learnt = {t: dict(zip(plan.common.modules, final[k].tolist(), strict=True)) for k, t in enumerate(tasks)}
    record = replace(
        plan.record(merged, dict.fromkeys(merged, 0.0)),
        method="adamerging",
        options={**options, "weights": learnt},
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
    )
    return Merged(assembled(name, plan.common, plan.adapters, merged), record)


def _descend(
    plan: Plan,
    modules: Mapping[str, nn.Module],
    weights: Tensor,
    used: Callable[[], Tensor],
    forward: Callable[[str, Batch], Tensor],
    batches: Mapping[str, Iterator[Batch]],
    learning_rate: float,
    steps: int,
) -> list[float]:
    optimiser = torch.optim.Adam([weights], lr=learning_rate)
    changes = _weighted(plan, list(modules), used)
    losses: list[float] = []
    for _ in range(steps):
        loss: Any = 0.0
        for task, stream in batches.items():
            with hooked((modules[m], change) for m, change in changes.items()):
                log_p = forward(task, next(stream)).float().log_softmax(-1)
            loss = loss - (log_p.exp() * log_p).sum(-1).mean()
        losses.append(float(loss.detach()))
        if not torch.isfinite(loss.detach()):
            raise RunError("the entropy is not finite", hint="a smaller learning rate, or float32")
        optimiser.zero_grad()
        loss.backward(inputs=[weights])
        optimiser.step()
    return losses


def _weighted(plan: Plan, modules: Sequence[str], used: Callable[[], Tensor]) -> dict[str, Change]:
    """Add sum_t l_t B_t (A_t x) for every module, differentiable in the weights."""

    def change(module: str, column: int) -> Change:
        x = plan.view(module)
        A, B = torch.cat(x.A), torch.cat(x.B, dim=1)
        owner = torch.repeat_interleave(torch.arange(len(x.tasks)), torch.tensor(x.ranks, dtype=torch.int64))

        def add(h: Tensor, output: Tensor) -> Tensor:
            scaled = (h.to(A.dtype) @ A.T) * used()[:, column][owner]
            return output + (scaled @ B.T).to(h.dtype)

        return add

    return {m: change(m, i if used().shape[1] > 1 else 0) for i, m in enumerate(modules)}
