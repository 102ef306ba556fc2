"""What factors alone tell: how far a merge is from each adapter on inputs that are assumed, not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LINEAR, Adapter, LoraFactors

# How much of the assumed moments is the adapter's own row space, the rest being isotropic; see `Assumed`.
OWN_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Terms:
    """The quadratic s -> |s D - D_t|^2 under task t's assumed moments, summed over modules relative to |D_t|^2.

    Args:
        own: tr(D_t m D_t^T), summed over modules.
        cross: tr(D m D_t^T).
        square: tr(D m D^T).
    """

    own: float
    cross: float
    square: float

    def error(self, scale: float) -> float:
        """The relative squared error of the merge at a scale: 0 for the adapter, 1 for the base."""
        return (scale * scale * self.square - 2 * scale * self.cross + self.own) / self.own if self.own > 0 else 0.0


def terms(merge: Adapter, adapters: Sequence[Adapter], share: float = OWN_SHARE) -> dict[str, Terms]:
    """Per adapter, how its own outputs and the merge's compare on inputs drawn from assumed moments.

    The moments assumed for adapter t at a module are m = share * D_t^T D_t / |D_t|^2 + (1 - share) * I / in: gradient
    steps put the inputs a task met into the rows of its update (WUDI's assumption), and the isotropic rest says that
    nothing else is known. Both have trace 1.

    Args:
        merge: At scale 1.
        adapters: What was merged.
        share: In [0, 1].

    Cost: products of (R, in) matrices; no module's dense delta is formed.
    """
    return {a.name: _summed([_terms(merge.modules[m], f, share) for m, f in _linear(a, merge)]) for a in adapters}


def _linear(adapter: Adapter, merge: Adapter) -> list[tuple[str, LoraFactors]]:
    return [(m, f) for m, f in adapter.modules.items() if f.kind == LINEAR and m in merge.modules]


def _terms(merge: LoraFactors, own: LoraFactors, share: float) -> Terms:
    f, g = own.folded(torch.float64), merge.folded(torch.float64)
    gram = _Assumed(f, share)
    seen = (gram(f.A, f.A), gram(g.A, f.A), gram(g.A, g.A))
    B = (f.B.T @ f.B, g.B.T @ f.B, g.B.T @ g.B)
    return Terms(*(float((b * s).sum()) for b, s in zip(B, seen, strict=True)))


class _Assumed:
    """X, Y -> X m Y^T for the moments assumed of one adapter's module."""

    def __init__(self, own: LoraFactors, share: float) -> None:
        size = float(((own.B.T @ own.B) * (own.A @ own.A.T)).sum())
        self.A, self.inner = own.A, own.B.T @ own.B / size if size > 0 else own.B.T @ own.B
        self.share, self.rest = share, (1 - share) / own.A.shape[1]

    def __call__(self, X: Float[Tensor, "j in"], Y: Float[Tensor, "k in"]) -> Float[Tensor, "j k"]:
        inside = (X @ self.A.T) @ self.inner @ (self.A @ Y.T)
        return self.share * inside + self.rest * (X @ Y.T)


def _summed(parts: Sequence[Terms]) -> Terms:
    """Each module counts alike: its own energy is taken as 1."""
    present = [p for p in parts if p.own > 0]
    n = max(1, len(present))
    return Terms(
        float(len(present)) / n, sum(p.cross / p.own for p in present) / n, sum(p.square / p.own for p in present) / n
    )


def mean_error(found: Mapping[str, Terms], scale: float) -> float:
    """The mean over adapters."""
    return sum(t.error(scale) for t in found.values()) / max(1, len(found))


def best_scale(found: Mapping[str, Terms]) -> float:
    """The scale of least mean error, in closed form; 0 for a merge that points away from every adapter."""
    square = sum(t.square / t.own for t in found.values() if t.own > 0)
    cross = sum(t.cross / t.own for t in found.values() if t.own > 0)
    return max(0.0, cross / square) if square > 0 else 0.0
