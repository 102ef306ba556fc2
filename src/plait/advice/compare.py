"""Adapters beside each other: lengths, directions, subspaces and signs, from small matrices of their factors alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations, pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.one_thread import in_one_thread
from plait.advice.comparison import AdapterLength, Comparison, Layer, Pair
from plait.advice.judgement import judged
from plait.choosing.notes import next_step
from plait.errors import UsageError
from plait.evaluation.interference import predicted_shifts
from plait.merging.align import align
from plait.merging.folders import read_all
from plait.merging.spectra.core import block_sums
from plait.seeds import seed_of
from plait.statistics import Statistics, read_statistics

SAMPLE = (
    4096  # entries of a module's update that are looked at: of 48 modules, an error of 0.1 points in the share of signs
)
_NOISE = 1e-10  # of the largest eigenvalue of a Gram matrix in float64: directions of A or B below 1e-5 of its longest


def compare_folders(
    folders: Sequence[str], statistics: Mapping[str, Path] | None = None, *, base_id: str | None = None
) -> Comparison:
    """Read adapters and compare them.

    Args:
        folders: ``PATH`` or ``NAME=PATH`` each, at least two.
        statistics: Task -> its statistics file.
        base_id: Base id where the adapters name one base by different names.

    Raises:
        UsageError: Fewer than two.
        InputError: An adapter that cannot be read, or adapters that no merge takes together.
    """
    if len(folders) < 2:
        raise UsageError("two adapters or more are compared", hint="plait inspect looks at one")
    known = {task: read_statistics(path) for task, path in (statistics or {}).items()}
    return compare(read_all(folders), known, base_id=base_id)


def compare(
    adapters: Sequence[Adapter], statistics: Mapping[str, Statistics] | None = None, *, base_id: str | None = None
) -> Comparison:
    """Compare adapters of one base.

    Lengths and cosines come from <D_t, D_u> = tr(B_t^T B_u A_u A_t^T), two (R, R) matrices a module. The overlap of two
    spans is |Q_t^T Q_u|^2 / min(r_t, r_u), 1 where one holds the other, and comes from the same matrices. Signs are those of
    `SAMPLE` entries a module, drawn by a seed that is the module's name: no update is formed.

    Args:
        adapters: At least two, their names distinct.
        statistics: Task -> its statistics; with them, what each adapter would do to each task's inputs is predicted.
        base_id: Base id where the adapters name one base by different names.

    Raises:
        InputError: They are not of one base, or differ in shape.

    Cost: R^2 (in + out) multiplications a module, R the sum of the ranks.
    """
    common = align(adapters, base_id, disjoint=True)
    names = [a.name for a in adapters]
    whole, layers = _Sums.of(names), dict[str, _Sums]()
    for module, (shape, _) in common.modules.items():
        layer = layers.setdefault(layer_of(module), _Sums.of(names))
        sums = _module(module, shape, [a.modules.get(module) for a in adapters], names)
        whole.add(sums)
        layer.add(sums)
    sizes = whole.sizes()
    squares = float(sizes.square().sum())
    lengths = tuple(
        AdapterLength(a.name, float(s), float(s) ** 2 / squares if squares else 0.0, len(a.modules), a.rank)
        for a, s in zip(adapters, sizes, strict=True)
    )
    rows = tuple(
        Layer(name, dict(zip(names, sums.sizes().tolist(), strict=True)), tuple(sums.pairs()))
        for name, sums in sorted(layers.items(), key=lambda pair: _natural(pair[0]))
    )
    shifts = predicted_shifts({a.name: a for a in adapters}, statistics) if statistics else {}
    comparison = Comparison(common.base, lengths, tuple(whole.pairs()), rows, shifts, len(common.modules))
    return judged(comparison, next_step(adapters, None))


def layer_of(module: str) -> str:
    """Name the layer of a module: its name up to the first number; a module without one stands for itself.

    >>> layer_of("encoder.layer.3.attention.self.query"), layer_of("lm_head")
    ('encoder.layer.3', 'lm_head')
    """
    match = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", module)
    return match.group() if match else module


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


@dataclass(slots=True)
class _Sums:
    """What is added up over modules, of T adapters.

    Args:
        names: Their names.
        products: (T, T) inner products of the deltas.
        spans: Per pair, the overlaps of A's and of B's spans and what chance gives for A's, summed over `shared` modules.
        shared: Per pair, in how many modules both have an update.
        signs: Per pair, over the sampled entries of both: those of opposite signs, those where neither is zero, sum of
            |a| + |b| - |a + b|, and sum of |a| + |b|; entries stand for all of their module.
    """

    names: Sequence[str]
    products: Float[Tensor, "T T"]
    spans: dict[tuple[int, int], Float[Tensor, 3]] = field(default_factory=dict)
    shared: dict[tuple[int, int], int] = field(default_factory=dict)
    signs: dict[tuple[int, int], Float[Tensor, 4]] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Sequence[str]) -> _Sums:
        return cls(names, torch.zeros(len(names), len(names), dtype=torch.float64))

    def add(self, other: _Sums) -> None:
        self.products += other.products
        for pair, count in other.shared.items():
            self.shared[pair] = self.shared.get(pair, 0) + count
            self.spans[pair] = self.spans.get(pair, 0) + other.spans[pair]
            self.signs[pair] = self.signs.get(pair, 0) + other.signs[pair]

    def sizes(self) -> Float[Tensor, " T"]:
        return self.products.diagonal().clamp_min(0).sqrt()

    def pairs(self) -> Iterator[Pair]:
        sizes = self.sizes()
        for i, j in combinations(range(len(self.names)), 2):
            both, shared = float(sizes[i] * sizes[j]), self.shared.get((i, j), 0)
            cosine = float(self.products[i, j]) / both if both > 0 else None
            if not shared:
                yield Pair(self.names[i], self.names[j], cosine)
                continue
            inside, outside, chance = (self.spans[i, j] / shared).tolist()
            opposite, present, cancelled, whole = self.signs[i, j].tolist()
            yield Pair(
                self.names[i], self.names[j], cosine, inside, outside, chance,
                opposite / present if present else None, cancelled / whole if whole else None, shared,
            )  # fmt: skip


def _module(module: str, shape: tuple[int, int], factors: Sequence[LoraFactors | None], names: Sequence[str]) -> _Sums:
    """Measure one module; adapters without it, or with an update of zero there, take part in no pair."""
    sums = _Sums.of(names)
    places = [t for t, f in enumerate(factors) if f is not None]
    folded = [f.folded(torch.float64) for f in factors if f is not None]
    ranks = [f.rank for f in folded]
    A, B = torch.cat([f.A for f in folded]), torch.cat([f.B for f in folded], dim=1)
    inner, outer = A @ A.T, B.T @ B
    products = block_sums(inner * outer, ranks)
    at = torch.tensor(places, dtype=torch.int64)
    sums.products[at[:, None], at] = products
    ends = [0, *accumulate(ranks)]
    parts = [slice(a, b) for a, b in pairwise(ends)]
    entries = _entries(module, shape, folded)
    live = [k for k in range(len(places)) if float(products[k, k]) > 0]
    rows, columns = ({k: _whitened(G[parts[k], parts[k]]) for k in live} for G in (inner, outer))
    for k, m in combinations(live, 2):
        pair = places[k], places[m]
        seen = _overlap(rows[k], inner[parts[k], parts[m]], rows[m])
        written = _overlap(columns[k], outer[parts[k], parts[m]], columns[m])
        chance = max(rows[k].shape[1], rows[m].shape[1]) / shape[1]
        sums.shared[pair] = 1
        sums.spans[pair] = torch.tensor([seen, written, chance], dtype=torch.float64)
        sums.signs[pair] = _signs(entries[k], entries[m]) * (shape[0] * shape[1] / SAMPLE)
    return sums


def _whitened(G: Float[Tensor, "r r"]) -> Float[Tensor, "r k"]:
    """W with W^T G W = I, noise left out: the rows whose Gram matrix is G, made orthonormal by W."""
    values, vectors = in_one_thread(torch.linalg.eigh, G)
    keep = values > _NOISE * values[-1]
    white: Tensor = vectors[:, keep] / values[keep].sqrt()
    return white


def _overlap(left: Float[Tensor, "r k"], between: Float[Tensor, "r s"], right: Float[Tensor, "s m"]) -> float:
    """Measure how much of the smaller span lies in the larger: 0 for none, 1 for all."""
    return float((left.T @ between @ right).square().sum()) / min(left.shape[1], right.shape[1])


def _entries(module: str, shape: tuple[int, int], factors: Sequence[LoraFactors]) -> list[Float[Tensor, " n"]]:
    """The same `SAMPLE` entries of each adapter's update, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed_of(module, "entries"))
    rows = torch.randint(shape[0], (SAMPLE,), generator=generator)
    columns = torch.randint(shape[1], (SAMPLE,), generator=generator)
    return [(f.B[rows] * f.A[:, columns].T).sum(1) for f in factors]


def _signs(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> Float[Tensor, 4]:
    both, size = a * b, a.abs() + b.abs()
    counted = [(both < 0).sum(), (both != 0).sum(), (size - (a + b).abs()).sum(), size.sum()]
    return torch.stack([c.double() for c in counted])
