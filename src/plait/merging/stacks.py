"""Stacks: modules of equal shapes and ranks, computed by one call of a method; where they would part ways, one by one."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LINEAR, LoraFactors
from plait.errors import InputError

if TYPE_CHECKING:
    from plait.merging.inputs import MergeInputs
    from plait.merging.plan import Plan

# Most modules of a stack: what a small operation of torch costs beside its arithmetic is paid once for all of them.
_MOST = 4
# Most numbers of all tasks' factors in a stack, 4 MB of float32: larger modules have arithmetic enough of their own.
_NUMBERS = 1 << 20


class PartingError(Exception):
    """Members of a stack would not be treated alike (a fallback of one, another count): each is to be computed alone."""


@dataclass(frozen=True, slots=True)
class FactorStack(LoraFactors):
    """The factors of several modules: A (n, rank, in), B (n, out, rank); rank and shape are those of each."""

    def __post_init__(self) -> None:
        if self.A.ndim != 3 or self.B.ndim != 3 or self.A.shape[1] != self.B.shape[2]:
            raise InputError(f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} are no stack of factors")

    def members(self) -> list[LoraFactors]:
        """The factors of each module; views."""
        return [LoraFactors(a, b, self.scaling, self.kind) for a, b in zip(self.A, self.B, strict=True)]


def factors_of(A: Float[Tensor, "... r in"], B: Float[Tensor, "... out r"], kind: str = LINEAR) -> LoraFactors:
    """Factors of scaling 1: of a module, or of a stack."""
    return LoraFactors(A, B, 1.0, kind) if A.ndim == 2 else FactorStack(A, B, 1.0, kind)


def common_count(which: Float[Tensor, "... k"]) -> int:
    """How many along the last dimension are true, where that is one number for all members.

    Raises:
        PartingError: It is not.
    """
    counts = which.sum(-1).flatten().tolist()
    if any(count != counts[0] for count in counts):
        raise PartingError
    return int(counts[0])


def stack_of(members: Sequence[MergeInputs]) -> MergeInputs:
    """Modules of equal shapes, ranks and kinds as one: every factor has a dimension for them in front."""
    first, n = members[0], len(members)
    (out, width), ranks = first.shape, list(first.ranks)
    A = torch.cat([a for x in members for a in x.A]).view(n, -1, width)
    B = torch.cat([b for x in members for b in x.B], dim=1).view(out, n, -1).transpose(0, 1)
    return replace(
        first,
        module=", ".join(x.module for x in members),
        A=torch.split(A, ranks, dim=-2),
        B=torch.split(B, ranks, dim=-1),
        members=tuple(members),
        joined=(A, B),
    )


def groups_of(plan: Plan) -> list[list[str]]:
    """The modules of a merge, those that are computed together in one list; by shapes, ranks, kinds and order alone.

    A module that finds no other of its kind, and every module of a method that takes no stacks or of a merge with weights by
    module, is alone in its list.
    """
    if not plan.method.stacks or plan.by_module:
        return [[m] for m in plan.common.modules]
    return grouped((m, *_likeness(plan, m)) for m in plan.common.modules)


def grouped(modules: Iterable[tuple[str, Hashable, int]]) -> list[list[str]]:
    """Lists of up to `most` modules that have one key, in the order in which they begin.

    Args:
        modules: (name, key, most) each.
    """
    groups: list[list[str]] = []
    open_ones: dict[Hashable, list[str]] = {}
    for name, key, most in modules:
        if key not in open_ones or len(open_ones[key]) >= most:
            groups.append([])
            open_ones[key] = groups[-1]
        open_ones[key].append(name)
    return groups


def _likeness(plan: Plan, module: str) -> tuple[Hashable, int]:
    """What modules of a stack have in common, and how many such modules one may hold."""
    shape, kind = plan.common.modules[module]
    ranks = tuple(a.modules[module].rank if module in a.modules else 0 for a in plan.adapters)
    total = sum(ranks)
    if not 0 < total <= min(shape):  # no basis of so many columns is found by `orthonormal`'s first way
        return (shape, kind, ranks), 1
    return (shape, kind, ranks), min(_MOST, max(1, _NUMBERS // (total * sum(shape))))


def merged_group(plan: Plan, names: Sequence[str], context: Any) -> list[tuple[LoraFactors, float]]:
    """What `Plan.merged` gives for each, by one call of the method where that is possible.

    Where a numerical check fails for one of them, or LAPACK does, all are computed one by one: what becomes of a module
    depends on its neighbours by rounding at most, and an error names the one that it is about.
    """
    if len(names) > 1:
        try:
            return _at_once(plan, names, context)
        except (PartingError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            pass
    return [plan.merged(m, context) for m in names]


def _at_once(plan: Plan, names: Sequence[str], context: Any) -> list[tuple[LoraFactors, float]]:
    views = [plan.view(m, context) for m in names]
    found = plan.method.function(stack_of(views), **plan.options)
    if not isinstance(found, FactorStack):
        raise TypeError(f"{plan.method.name} takes stacks but gave {type(found).__name__}")
    done = [(x.module, *plan.adjusted(part, x)) for part, x in zip(found.members(), views, strict=True)]
    return [(plan.checked(factors, module), lost) for module, factors, lost in done]
