"""What factors alone tell: how far a merge is from each adapter on inputs that are assumed, not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import Adapter, LoraFactors
from plait.merging.spectra.core import gram
from plait.merging.workers import side_by_side

# How much of the assumed moments is the adapter's own row space, the rest being isotropic. 0 makes eight unrelated
# adapters share the scale 1/8, 1 lets each keep 1; at 0.05 the closed form gives TSV-M of eight kaiming adapters the scale
# that labels chose in docs/results/glue8-minilm-one-seed.md (0.5).
OWN_SHARE = 0.05


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
        """Compute the relative squared error of the merge at a scale: 0 for the adapter, 1 for the base."""
        return (scale * scale * self.square - 2 * scale * self.cross + self.own) / self.own if self.own > 0 else 0.0


def terms(merge: Adapter, adapters: Sequence[Adapter], share: float = OWN_SHARE) -> dict[str, Terms]:
    """Per adapter, how its own outputs and the merge's compare on inputs drawn from assumed moments.

    The moments assumed for adapter t at a module are m = share * D_t^T D_t / |D_t|^2 + (1 - share) * I / in: gradient
    steps put the inputs a task met into the rows of its update (WUDI's assumption), and the isotropic rest says that
    nothing else is known. Both have trace 1.

    Args:
        merge: At scale 1.
        adapters: What was merged.
        share: A share in [0, 1].

    Cost: products of (R, in) matrices; no module's dense delta is formed.
    """
    return terms_over(merge, adapters, [share])[share]


def terms_over(merge: Adapter, adapters: Sequence[Adapter], shares: Sequence[float]) -> dict[float, dict[str, Terms]]:
    """`terms` for several shares, the products taken once."""
    parts: dict[str, list[Tensor]] = {a.name: [] for a in adapters}
    present = {m: here for m in merge.modules if (here := [a for a in adapters if m in a.modules])}

    def of(module: str) -> Tensor:
        own = [a.modules[module].folded(torch.float64) for a in present[module]]
        return _terms(merge.modules[module].folded(torch.float64), own)

    # Products too small for torch's threads, which would wait for each other longer than they compute.
    for module, both in zip(present, side_by_side(of, list(present), torch.device("cpu")), strict=True):
        for adapter, one in zip(present[module], both, strict=True):
            parts[adapter.name].append(one)
    return {
        s: {name: _summed([s * own + (1 - s) * rest for own, rest in pairs]) for name, pairs in parts.items()}
        for s in shares
    }


def _terms(g: LoraFactors, own: Sequence[LoraFactors]) -> Float[Tensor, "T 2 3"]:
    """Per adapter, (own, cross, square) of a module under the row space of its delta, and under I / in.

    All adapters at once: the merge's own Gram matrices are formed once, and what it has in common with each of them comes from one
    product with the factors of all. With P_t = A A_t^T, N_t = B_t^T B_t and M_t = N_t / |D_t|^2 the squares are
    tr(B^T B P_t M_t P_t^T) and tr(B^T B A A^T) / in.
    """
    A, B = torch.cat([f.A for f in own]), torch.cat([f.B for f in own], dim=1)
    ranks = [f.rank for f in own]
    square_B = g.B.T @ g.B
    rest = (square_B * (g.A @ g.A.T)).sum()
    between, across = g.A @ A.T, g.B.T @ B
    turned = square_B @ between
    split = [torch.split(M, ranks, dim=1) for M in (between, across, turned)]
    found = []
    for f, P, C, Q in zip(own, *split, strict=True):
        inner, seen = f.B.T @ f.B, f.A @ f.A.T
        size = (inner * seen).sum()
        inside = inner / size if size > 0 else inner
        moved = inside @ seen
        shaped = P @ inside
        under = torch.stack([(inner * (seen @ moved)).sum(), (C * (P @ moved)).sum(), (Q * shaped).sum()])
        flat = torch.stack([size, (C * P).sum(), rest]) / f.A.shape[1]
        found.append(torch.stack([under, flat]))
    return torch.stack(found)


def _summed(parts: Sequence[Tensor]) -> Terms:
    """Each module counts alike: its own energy is taken as 1."""
    present = [p / p[0] for p in parts if p[0] > 0]
    return Terms(*torch.stack(present).mean(0).tolist()) if present else Terms(0.0, 0.0, 0.0)


def mean_error(errors: Mapping[str, Terms], scale: float) -> float:
    """Average the errors over adapters."""
    return sum(t.error(scale) for t in errors.values()) / max(1, len(errors))


def best_scale(errors: Mapping[str, Terms]) -> float:
    """Find the scale of least mean error, in closed form; 0 for a merge that points away from every adapter."""
    square = sum(t.square / t.own for t in errors.values() if t.own > 0)
    cross = sum(t.cross / t.own for t in errors.values() if t.own > 0)
    return max(0.0, cross / square) if square > 0 else 0.0


def cosines(adapters: Sequence[Adapter]) -> dict[tuple[str, str], float]:
    """Per pair, the cosine of their task vectors; 0 where one of them is zero."""
    names = [a.name for a in adapters]
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    modules = sorted({m for a in adapters for m in a.modules})
    places = {m: [i for i, a in enumerate(adapters) if m in a.modules] for m in modules}

    def products(module: str) -> Tensor:
        folded = [adapters[i].modules[module].folded() for i in places[module]]
        return gram([f.A for f in folded], [f.B for f in folded])

    for module, found in zip(modules, side_by_side(products, modules, torch.device("cpu")), strict=True):
        at = torch.tensor(places[module], dtype=torch.int64)
        total[at[:, None], at] += found
    sizes = total.diagonal().clamp_min(0).sqrt()
    norms = sizes[:, None] * sizes
    return {
        (names[i], names[j]): float(total[i, j] / norms[i, j]) if norms[i, j] > 0 else 0.0
        for i in range(len(names))
        for j in range(i + 1, len(names))
    }
