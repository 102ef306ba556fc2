"""Keeping A in its subspace while training: four constraints, as arithmetic around an optimiser step.

`free` does nothing. `frozen` never moves A. `projected` sends A back after each step, A <- A Q^T Q. `penalised` adds
the gradient of beta * sum over modules of tr(G D m D^T) / tr(W0 m W0^T) before each step, with D = s B A and m the other
tasks' mean normalised second moment: the relative shift of their outputs. G is the identity, or where curvature is known the
second moment of gradients there, its mean eigenvalue 1: then shifts count by what they do to predictions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from plait.border.module_names import named_by
from plait.errors import InputError


@dataclass(frozen=True, slots=True)
class Rule:
    """What a constraint does to one module.

    Args:
        matrix: (m, d) orthonormal rows to project on, or the others' (d, d) moment; shared where modules share an input.
        weight: beta / tr(W0 m W0^T) of a penalty; 0 for a projection.
        outputs: (out, out) symmetric G of a penalty; None for the identity.
    """

    matrix: Tensor
    weight: float = 0.0
    outputs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Constraint:
    """One adapter's constraint.

    Args:
        kind: "free", "frozen", "projected" or "penalised".
        rules: Module, relative to the backbone -> rule; empty for free and frozen.
    """

    kind: str = "free"
    rules: Mapping[str, Rule] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cell:
    """One module's factors of one adapter, where they are trained: tensors that are changed in place.

    Args:
        A: (r, d) values.
        B: (out, r) values.
        A_gradient, B_gradient: Gradients of the same shapes.
        scaling: s in D = s B A.
        rule: What is done to them.
    """

    A: Tensor
    B: Tensor
    A_gradient: Tensor
    B_gradient: Tensor
    scaling: float
    rule: Rule


def projected_rows(A: Float[Tensor, "n r d"], Q: Float[Tensor, "n m d"]) -> Float[Tensor, "n r d"]:
    """Project rows, A Q^T Q: the nearest rows in the span of Q's orthonormal rows.

    >>> projected_rows(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 0.0]]])).tolist()
    [[[1.0, 0.0]]]
    """
    return torch.bmm(torch.bmm(A, Q.transpose(1, 2)), Q)


def penalty_gradients(
    A: Float[Tensor, "n r d"],
    B: Float[Tensor, "n out r"],
    AM: Float[Tensor, "n r d"],
    weight: Float[Tensor, "n 1 1"],
    GB: Float[Tensor, "n out r"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients of weight * tr(G B A M A^T B^T), M and G symmetric.

    Args:
        A: Factor.
        B: Factor.
        AM: A M, which the caller computes (adapters that share M share the product).
        weight: beta s^2 / tr(W0 M W0^T).
        GB: G B; None where G is the identity.

    Returns:
        (n,) values, gradients of A and of B: 2 w (B^T G B) A M and 2 w G B (A M A^T).
    """
    GB = B if GB is None else GB
    inner = torch.bmm(AM, A.transpose(1, 2))
    gram = torch.bmm(B.transpose(1, 2), GB)
    values = (weight[:, 0, 0]) * (gram * inner).sum((1, 2))
    return values, 2 * weight * torch.bmm(gram, AM), 2 * weight * torch.bmm(GB, inner)


class Enforcer:
    """Applies constraints to cells before and after an optimiser step; cells of one shape in one batched product.

    Cost: two (r, d) x (d, m) products a module for a projection; one (r, d) x (d, d) for a penalty, and with curvature one
    (out, out) x (out, r). The matrices are held once more on the cells' device, stacked.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        stacks: dict[tuple[Any, ...], Tensor] = {}
        self._projected = [_Batch(b, stacks) for b in _by_shape([c for c in cells if c.rule.weight == 0.0])]
        self._penalised = [_Batch(b, stacks) for b in _by_shape([c for c in cells if c.rule.weight != 0.0])]

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the penalties' gradients to what the optimiser is about to use (after clipping: they are not clipped)."""
        for batch in self._penalised:
            _, of_A, of_B = batch.penalty()
            torch._foreach_add_(batch.A_gradients, list(of_A.unbind()))
            torch._foreach_add_(batch.B_gradients, list(of_B.unbind()))

    @torch.no_grad()
    def after_step(self) -> None:
        """Send A back into its span."""
        for batch in self._projected:
            torch._foreach_copy_(batch.As, list(batch.projected().unbind()))

    @torch.no_grad()
    def penalty(self) -> float:
        """Sum the penalties at present."""
        return float(sum(float(batch.penalty()[0].sum()) for batch in self._penalised))


def stacked_bytes(constraints: Iterable[Constraint]) -> int:
    """Bytes that an `Enforcer` of these constraints holds on its device: each of their matrices once, in float32."""
    rules = [rule for constraint in constraints for rule in constraint.rules.values()]
    held = {id(m): m for rule in rules for m in (rule.matrix, rule.outputs) if m is not None}
    return sum(4 * m.numel() for m in held.values())


class _Stack:
    """One matrix for each of some cells, each held once where it serves as many cells as the others do.

    Args:
        matrices: In the order of the cells; those that are one tensor stand together.
        device: Where the cells are.
        stacks: What other batches have stacked already, such as the inputs' moments of v, with another number of outputs than q.
    """

    def __init__(self, matrices: Sequence[Tensor], device: torch.device, stacks: dict[tuple[Any, ...], Tensor]) -> None:
        keys = [id(m) for m in matrices]
        distinct = {id(m): m for m in matrices}
        even = len({keys.count(k) for k in distinct}) == 1
        chosen = list(distinct.values()) if even else list(matrices)
        same = (device, *map(id, chosen))
        if same not in stacks:
            stacks[same] = torch.stack([m.to(device, torch.float32) for m in chosen])
        self.matrices = stacks[same]

    def under(self, rows: Tensor) -> Tensor:
        """(matrices, sharing * r, d): the rows of all cells of a matrix beneath each other."""
        return rows.reshape(len(self.matrices), -1, rows.shape[-1])

    def times(self, rows: Tensor) -> Tensor:
        """(n, r, d) rows of every cell times its matrix."""
        return torch.bmm(self.under(rows), self.matrices).view(rows.shape)


class _Batch:
    """Cells of one shape, ordered by the matrices they use; `stacks` are shared with batches that use the same ones."""

    def __init__(self, cells: Sequence[Cell], stacks: dict[tuple[Any, ...], Tensor]) -> None:
        groups: dict[int, dict[int, list[Cell]]] = {}
        for c in cells:
            groups.setdefault(id(c.rule.matrix), {}).setdefault(id(c.rule.outputs), []).append(c)
        cells = [c for inner in groups.values() for each in inner.values() for c in each]
        device = cells[0].A.device
        self.inputs = _Stack([c.rule.matrix for c in cells], device, stacks)
        outputs = [c.rule.outputs for c in cells if c.rule.outputs is not None]
        self.outputs = _Stack(outputs, device, stacks) if outputs else None  # all or none: see `_by_shape`
        self.As, self.Bs = [c.A for c in cells], [c.B for c in cells]
        self.A_gradients, self.B_gradients = [c.A_gradient for c in cells], [c.B_gradient for c in cells]
        weights = [c.rule.weight * c.scaling**2 for c in cells]
        self.weight = torch.tensor(weights, dtype=torch.float32, device=device)[:, None, None]

    def projected(self) -> Tensor:
        A = torch.stack(self.As).float()
        return projected_rows(self.inputs.under(A), self.inputs.matrices).view(A.shape)

    def penalty(self) -> tuple[Tensor, Tensor, Tensor]:
        A, B = torch.stack(self.As).float(), torch.stack(self.Bs).float()
        GB = None if self.outputs is None else self.outputs.times(B.mT.contiguous()).mT
        return penalty_gradients(A, B, self.inputs.times(A), self.weight, GB)


def _by_shape(cells: Sequence[Cell]) -> list[list[Cell]]:
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        key = (cell.A.shape, cell.B.shape, cell.rule.matrix.shape, cell.rule.outputs is None)
        groups.setdefault(key, []).append(cell)
    return list(groups.values())


# --- on a model that somebody else trains -----------------------------------------------------------------------------


def freeze_rows(model: Any) -> None:
    """Stop training every A of a PeftModel; before the optimiser is made, or before DDP wraps the model."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)


def cells_of(model: Any, constraint: Constraint, adapter_name: str = "default") -> list[Cell]:
    """Collect the cells of a PeftModel's adapter; in place of the gradients, the parameters whose `grad` they will be.

    Raises:
        InputError: A module of the constraint has no LoRA layer in the model, or several do.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    cells = []
    for module, rule in constraint.rules.items():
        found = [name for name in layers if named_by(name, module)]
        if len(found) != 1:
            what = f"is one of several: {', '.join(found[:3])}" if found else "has no LoRA layer in this model"
            raise InputError(f"the constraint's module {what}", where=module)
        layer = layers[found[0]]
        A: Any = layer.lora_A[adapter_name].weight
        B: Any = layer.lora_B[adapter_name].weight
        cells.append(Cell(A.data, B.data, A, B, float(layer.scaling[adapter_name]), rule))
    return cells


def attach_constraint(optimizer: Any, model: Any, constraint: Constraint) -> Callable[[], None]:
    """Make an optimiser keep a constraint on a PeftModel it trains, in any loop.

    The work hangs on the optimiser's own step, so it happens once a step whatever accumulation, mixed precision or
    number of processes: under DDP every process adds the same numbers to gradients that are already averaged.

    Args:
        optimizer: A torch optimiser, or a wrapper with the attribute `optimizer` (accelerate).
        model: A PeftModel, bare or wrapped by DDP.
        constraint: From `prepare_constraint`.

    Returns:
        A function that takes the hooks off again.

    **Deviates**: The penalty's gradient joins after gradient clipping, as weight decay does in AdamW; the loss that a
    trainer logs does not contain it.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    bare = getattr(model, "module", model)
    if constraint.kind == "frozen":
        freeze_rows(bare)
    cells = cells_of(bare, constraint)
    if not cells:
        return lambda: None
    owned: list[Tensor] = [p for c in cells for p in (c.A_gradient, c.B_gradient)]  # parameters: .grad is new each step
    zeros = functools.partial(torch.zeros_like, dtype=torch.float32)  # whatever the factors are trained in
    buffers = [Cell(c.A, c.B, zeros(c.A), zeros(c.B), c.scaling, c.rule) for c in cells]
    enforcer = Enforcer(buffers)
    if constraint.kind == "projected":
        enforcer.after_step()

    def before(*_: Any) -> None:
        added = [g for c in buffers for g in (c.A_gradient, c.B_gradient)]
        torch._foreach_zero_(added)
        enforcer.before_step()
        for parameter, gradient in zip(owned, added, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(gradient)

    hooks = []
    if constraint.kind == "penalised":
        hooks.append(inner.register_step_pre_hook(before))
    if constraint.kind == "projected":
        hooks.append(inner.register_step_post_hook(lambda *_: enforcer.after_step()))

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove
