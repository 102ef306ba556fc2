"""Dense updates of linear modules: trained beside the frozen weights, held in place, merged and worn, without factors of full width.

A dense update is an `Adapter` whose A is the identity, one tensor for all modules of a width, and whose B is the update D itself: what
reads adapters reads it, and what is here looks at D alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from plait.adapters.lora import Adapter, LoraFactors
from plait.evaluation.protocol import Answers, Scorer, compact
from plait.evaluation.splits import Rows
from plait.merging import merge
from plait.merging.spectra.core import polar, significant
from plait.model.applied import resolve
from plait.model.base import head_modules
from plait.model.hooks import Change, hooked
from plait.statistics import Statistics
from plait.training.constraints import Constraint


def as_adapter(like: Adapter, deltas: Mapping[str, Tensor]) -> Adapter:
    """Dense updates of an adapter's modules as an adapter: A the identity, B the update as it is given."""
    eyes = {f.shape[1]: torch.eye(f.shape[1], dtype=torch.float32) for f in like.modules.values()}
    modules = {m: LoraFactors(eyes[f.shape[1]], deltas[m], 1.0, f.kind) for m, f in like.modules.items()}
    return replace(like, modules=modules)


def norm(adapter: Adapter) -> float:
    """Frobenius norm of a dense update of all modules."""
    return math.sqrt(sum(float(f.B.double().square().sum()) for f in adapter.modules.values()))


# --- worn -------------------------------------------------------------------------------------------------------------


def beside(D: Tensor, scale: float = 1.0) -> Change:
    """Add ``scale * D x`` to a module's output, in the type of D, or in that of autocast where it is on."""

    def add_update(x: Tensor, output: Tensor) -> Tensor:
        wide = x if torch.is_autocast_enabled(x.device.type) else x.to(D.dtype)
        update = nn.functional.linear(wide, D)
        return output + (update if scale == 1.0 else scale * update).to(output.dtype)

    return add_update


@contextmanager
def worn(model: nn.Module, adapter: Adapter, scale: float = 1.0) -> Iterator[None]:
    """Compute with a dense update beside the weights, as `plait.model.applied` does with factors, in one product a module."""
    device = next(model.parameters()).device
    changes = [
        (resolve(model, m, adapter.prefix), beside(f.B.to(device), scale)) for m, f in adapter.modules.items() if scale
    ]
    with hooked(changes):
        yield


class DenseScorer(Scorer):
    """A `Scorer` of dense updates."""

    def answers(self, task: str, active: Sequence[tuple[Adapter | None, float]], rows: Rows) -> list[Answers]:
        """Class ids or values of each (update, scale) on these rows, one after another."""
        evaluator, head, found = self.evaluator, self.heads[task], []
        for adapter, scale in active:
            model = evaluator.task_model(task)
            if adapter is None:
                logits = evaluator.predict(task, head, None, 0.0, rows)
            else:
                with worn(model, adapter, scale):
                    logits = evaluator.predict(task, head, None, 0.0, rows)
            found.append(compact(logits, evaluator.tasks[task]))
        return found


# --- trained ----------------------------------------------------------------------------------------------------------


@contextmanager
def trainable(model: nn.Module, like: Adapter) -> Iterator[dict[str, nn.Parameter]]:
    """Within the block a model computes with dense updates that can be trained: zero, float32; its head is trained with them.

    Args:
        model: A task's model; of it the head alone stays trainable, in float32, and of a decoder nothing: its output layer is no head.
        like: From `plait.training.peft_model.for_task`: which modules, and whether there is a head.
    """
    model.requires_grad_(False)
    for name in head_modules(model) if like.heads else ():
        for parameter in model.get_submodule(name).parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    device = next(model.parameters()).device
    updates = {
        m: nn.Parameter(torch.zeros(f.shape, dtype=torch.float32, device=device)) for m, f in like.modules.items()
    }
    with hooked([(resolve(model, m, like.prefix), beside(D)) for m, D in updates.items()]):
        yield updates


class DensePenalty:
    """Gradients of the sum over modules of w tr(D m D^T), which are 2 w D m: one product a site, sites of one shape together.

    What `plait.training.constraints.Enforcer` adds to B where A is the identity; that one multiplies m and D^T D by the identity first.
    """

    def __init__(self, updates: Mapping[str, nn.Parameter], constraint: Constraint) -> None:
        sites: dict[int, list[str]] = {}
        for module, rule in constraint.rules.items():
            if rule.outputs is not None:
                raise SystemExit(f"{module}: dense updates know no curvature")
            sites.setdefault(id(rule.matrix), []).append(module)
        shapes: dict[tuple[tuple[int, ...], ...], list[list[str]]] = {}
        for names in sites.values():
            shapes.setdefault(tuple(tuple(updates[m].shape) for m in names), []).append(names)
        self._groups = []
        for shape, groups in shapes.items():
            of = [[updates[m] for m in names] for names in groups]
            device, rules = of[0][0].device, constraint.rules
            matrices = torch.stack([rules[names[0]].matrix.to(device, torch.float32) for names in groups])
            weights = torch.tensor([[rules[m].weight for m in names] for names in groups], device=device)
            rows = torch.tensor([out for out, _ in shape], device=device)
            self._groups.append((of, matrices, 2 * weights.repeat_interleave(rows, 1)[..., None]))

    @torch.no_grad()
    def add(self) -> None:
        """Add the penalty's gradient to what the optimiser is about to use."""
        for of, matrices, weight in self._groups:
            D = torch.stack([torch.cat(list(parameters)) for parameters in of])
            parts = (weight * torch.bmm(D, matrices)).unbind()
            for parameters, part in zip(of, parts, strict=True):
                pieces = torch.split(part, [len(p) for p in parameters])
                torch._foreach_add_([p.grad for p in parameters], list(pieces))


# --- merged -----------------------------------------------------------------------------------------------------------


def merged(
    adapters: Mapping[str, Adapter], method: str, statistics: Mapping[str, Statistics], device: torch.device
) -> Adapter:
    """The merge of dense updates at scale 1, as dense updates on the device."""
    first = next(iter(adapters.values()))
    if method == "regmean":
        inputs = [narrow(a) for a in adapters.values()]
        on_device = {
            t: replace(s, sites={k: m.to(device) for k, m in s.sites.items()}) for t, s in statistics.items()
        }  # it multiplies by them where they lie
        made = merge(inputs, method, scale=1.0, statistics=on_device, device=str(device), verify=False).adapter
        return as_adapter(made, {m: f.B.to(device) @ f.A.to(device) for m, f in made.modules.items()})
    one = {"task_arithmetic": sum_of, "tsv": tsv}[method]
    return as_adapter(first, {m: one([a.modules[m].B.to(device) for a in adapters.values()]) for m in first.modules})


def narrow(adapter: Adapter) -> Adapter:
    """The same updates with the identity on their narrower side."""
    modules = {}
    for m, f in adapter.modules.items():
        out, width = f.shape
        D = f.B.cpu()
        eye = torch.eye(min(f.shape), dtype=torch.float32)
        modules[m] = LoraFactors(D, eye, 1.0, f.kind) if out < width else LoraFactors(eye, D, 1.0, f.kind)
    return replace(adapter, modules=modules)


def sum_of(deltas: Sequence[Tensor]) -> Tensor:
    """Task arithmetic."""
    return torch.stack(list(deltas)).sum(0)


def tsv(deltas: Sequence[Tensor]) -> Tensor:
    """TSV-M: polar([U_1 ..]) diag(S_1 ..) polar([V_1 ..])^T of each update's largest singular triplets.

    As many as the width over the number of tasks, as published; what `plait.merging` makes of updates that were cut to these, which would
    be factors whose triplets it had to find again.
    """
    U, S, V = zip(*(triplets(D, max(1, min(D.shape) // len(deltas))) for D in deltas), strict=True)
    if not torch.cat(S).numel():
        return torch.zeros_like(deltas[0])
    return ((polar(torch.cat(U, 1)) * torch.cat(S)) @ polar(torch.cat(V, 1)).mT).to(deltas[0].dtype)


def triplets(D: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular triplets without zeros, U (out, k), S (k,), V (in, k), float64.

    By eigenvectors of the smaller Gram matrix, a third of an SVD's time or less; what is lost lies below 1e-8 of the largest value.
    """
    if D.shape[0] < D.shape[1]:
        V, S, U = triplets(D.mT, k)
        return U, S, V
    wide = D.double()
    squares, vectors = torch.linalg.eigh(wide.mT @ wide)
    S, V = squares[-k:].flip(0).clamp(min=0).sqrt(), vectors[:, -k:].flip(1)
    S, V = S[: significant(S)], V[:, : significant(S)]
    return wide @ V / S, S, V
