"""A merged delta that is not low rank: dense rows made block by block, and their cut to a LoRA of a given rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LINEAR, LoraFactors
from plait.adapters.memory import again_like, own_copy
from plait.merging.spectra.basis import spanning
from plait.merging.spectra.small_svd import thin_svd

# Entries of a block for which random draws are made together: results depend on it.
BLOCK = 1 << 18
# Entries that are computed together, on which nothing but speed depends: on a CPU a block of one task, what a rule adds up
# and a sign or mask stay in a core's own cache (2 MB); a GPU needs work for all its parts.
_ON_CPU, _ON_GPU = 1 << 15, 1 << 24
# Entries that are asked for at once where a delta is gone through, 64 MB of float32: most modules whole.
AT_ONCE = 1 << 24
# A module whose dense delta is at most this large is computed once and held while it is cut; a larger one is made anew
# in every pass. 64 Mi entries are 256 MB, enough for every linear layer of an 8 B model.
_HELD = 1 << 26
_OVERSAMPLED = 32
_ROWS = 512  # of a dense delta that are added up at once


def rows_together(width: int, entries: int = BLOCK) -> int:
    """Say how many rows so many entries are, at least one."""
    return max(1, entries // max(1, width))


def row_blocks(shape: tuple[int, int], entries: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Row ranges [start, stop) that cover a matrix; they depend on its shape alone, so random draws per block do too."""
    rows = rows_together(shape[1], entries)
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def entries_together(device: torch.device) -> int:
    """Say how many entries an elementwise rule is given at once."""
    return _ON_CPU if device.type == "cpu" else _ON_GPU


@dataclass(frozen=True, slots=True)
class DenseDelta:
    """A dense (out, in) delta given by its row blocks.

    Args:
        shape: (out, in).
        rows: (start, stop) of any range -> (stop - start, in) float32; the same bits whenever called with it.
        entries: How many are computed together.
        factors: What the rows are the product of, but for rounding, where they are one.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], Float[Tensor, "n in"]]
    entries: int = BLOCK
    factors: LoraFactors | None = None

    def blocks(self) -> Iterator[tuple[int, int, Float[Tensor, "n in"]]]:
        """Every block, in order, with its range."""
        for start, stop in row_blocks(self.shape, self.entries):
            yield start, stop, self.rows(start, stop)

    def dense(self) -> Float[Tensor, "out in"]:
        """The whole matrix."""
        whole: Tensor | None = None
        for start, stop, block in self.blocks():
            if len(block) == self.shape[0]:
                return block
            whole = again_like("whole", block, self.shape) if whole is None else whole
            whole[start:stop] = block
        return torch.empty(self.shape, dtype=torch.float32) if whole is None else whole

    def held(self) -> DenseDelta:
        """The same delta, computed once where it is small enough to be held."""
        if self.shape[0] * self.shape[1] > _HELD:
            return self
        whole = self.dense()
        return DenseDelta(self.shape, lambda start, stop: whole[start:stop], max(1, whole.numel()))

    def energy(self) -> float:
        """Squared Frobenius norm: a sum in float64 of short sums in float32, off by 1e-7 of it at most."""
        return sum(_squared(block) for _, _, block in self.blocks())

    def times(self, X: Float[Tensor, "in k"]) -> Float[Tensor, "out k"]:
        """D X."""
        return torch.cat([block @ X for _, _, block in self.blocks()])

    def transposed_times(self, Y: Float[Tensor, "out k"]) -> Float[Tensor, "in k"]:
        """D^T Y."""
        total = torch.zeros(Y.shape[1], self.shape[1], dtype=Y.dtype, device=Y.device)
        for start, stop, block in self.blocks():
            # A third faster than the transpose of the large factor, and on a CPU a fifth faster by few rows at a time.
            rows = _ROWS if block.device.type == "cpu" else max(1, len(block))
            for i in range(0, stop - start, rows):
                total.addmm_(Y[start + i : min(stop, start + i + rows)].T, block[i : i + rows])
        return total.T


@dataclass(frozen=True, slots=True)
class Truncated:
    """Factors that a method itself cut, and the fraction of the energy it lost, in [0, 1]."""

    factors: LoraFactors
    lost: float


MergedDelta = LoraFactors | DenseDelta | Truncated


def as_dense(delta: LoraFactors | Truncated) -> DenseDelta:
    """Low-rank factors as rows made block by block."""
    f = (delta.factors if isinstance(delta, Truncated) else delta).folded(torch.float32)
    return DenseDelta(f.shape, lambda start, stop: f.B[start:stop] @ f.A, factors=f)


def cut_to_rank(
    delta: DenseDelta,
    rank: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    near: Sequence[LoraFactors] = (),
) -> tuple[LoraFactors, float]:
    """The SVD of a dense delta at a rank by subspace iteration, and the fraction of its energy that is lost.

    What masks and elections leave has a long tail of singular values, among which random directions find the largest slowly; the
    output directions of what was masked lie near them from the start, and save a pass. Exact where the rank reaches min(out, in).

    Args:
        delta: Of one module.
        rank: At least 1.
        generator: Draws directions where `near` has fewer than are looked for, on the CPU.
        device: Where the blocks are.
        near: Updates of this shape that the delta was made of.

    Returns:
        Factors of scaling 1, and the lost energy in [0, 1].

    Cost:
        3 passes of out * in * (rank + 32) multiplications; memory of one block and (out + in) (rank + 32) numbers.
    Source: Halko, Martinsson & Tropp, SIAM Review 2011, algorithm 4.4, begun with directions that are known.
    """
    delta = delta.held()
    short = min(delta.shape)
    if rank >= short:
        return _exactly(delta), 0.0
    width = min(rank + _OVERSAMPLED, short)
    Y = _directions(delta.shape[0], width, near, generator)
    Z = spanning(delta.transposed_times(spanning(Y.to(device))))
    Q = torch.linalg.qr(delta.times(Z))[0]
    U, S, Vt = (part.to(Q.dtype) for part in thin_svd(delta.transposed_times(Q).T.double()))
    total = delta.energy()
    kept = float(S[:rank].double().square().sum())
    root = S[:rank].sqrt()
    factors = LoraFactors(own_copy(root[:, None] * Vt[:rank]), own_copy(Q @ (U[:, :rank] * root)))
    return factors, max(0.0, 1.0 - kept / total) if total > 0 else 0.0


def _directions(
    out: int, width: int, near: Sequence[LoraFactors], generator: torch.Generator
) -> Float[Tensor, "out width"]:
    """Columns of some updates' factors, or where there are more than wanted, sums of them at random; and random ones beside."""
    lefts = [f.B * f.A.norm(dim=1) for f in near if f.rank]
    held = torch.cat(lefts, 1).float() if lefts else torch.empty(out, 0, dtype=torch.float32)
    drawn = partial(torch.randn, generator=generator, dtype=torch.float32)
    if held.shape[1] > width:
        return held @ drawn(held.shape[1], width).to(held.device)
    return torch.cat([held, drawn(out, width - held.shape[1]).to(held.device)], 1)


def _squared(block: Float[Tensor, "n in"]) -> float:
    """The sum of squares: of a core's cache at a time, or on a GPU of all rows at once, since it is waited for."""
    if block.device.type != "cpu":
        return float(torch.linalg.vecdot(block, block).sum(dtype=torch.float64))
    pieces = (block[i:j].flatten() for i, j in row_blocks((len(block), block.shape[1]), _ON_CPU))
    return sum(float(piece @ piece) for piece in pieces)


def _exactly(delta: DenseDelta) -> LoraFactors:
    whole = delta.dense()
    out, width = delta.shape
    if out <= width:
        return LoraFactors(whole, torch.eye(out, dtype=whole.dtype, device=whole.device), 1.0, LINEAR)
    return LoraFactors(torch.eye(width, dtype=whole.dtype, device=whole.device), whole, 1.0, LINEAR)
