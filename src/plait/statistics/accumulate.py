"""Running sums of one site while batches go by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from plait.statistics.masks import Positions, sent
from plait.statistics.moments import DENSE, FACTOR, Moments, rotated
from plait.statistics.sketch import FrequentDirections

POOLS = ("token", "mean")
# Narrower blocks leave more out and run slower: of a product's time these leave 0.6 to 0.7, measured at widths 384 to 4096.
BLOCK_WIDTH, WIDE_BLOCK, WIDE = 128, 256, 1024


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """Float32 products in float32: TF32 and bf16 shortcuts off, whatever the caller has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_gram(S: Float[Tensor, "d d"], rows: Float[Tensor, "n d"]) -> None:
    """S += rows^T rows, in S's precision; of a wide S on the CPU only the blocks from the diagonal on (see `mirror`).

    Products of two half-precision numbers are exact in float32, so on a GPU the rows go to the tensor cores as they are.
    """
    if (block := _block_of(S)) is not None:
        rows = rows.to(S.dtype)
        for i in range(0, len(S), block):
            S[i : i + block, i:].addmm_(rows[:, i : i + block].T, rows[:, i:])
    elif rows.dtype == S.dtype:
        S.addmm_(rows.T, rows)
    elif rows.is_cuda and rows.element_size() == 2 and S.dtype == torch.float32:
        S.add_(torch.mm(rows.T, rows, out_dtype=torch.float32))
    else:
        rows = rows.to(S.dtype)
        S.addmm_(rows.T, rows)


def mirror(S: Float[Tensor, "d d"]) -> None:
    """Fill in what `add_gram` left out, in place: S is symmetric."""
    if (block := _block_of(S)) is not None:
        for i in range(0, len(S), block):
            S[i + block :, i : i + block] = S[i : i + block, i + block :].T


def _block_of(S: Tensor) -> int | None:
    """Rows of S that are added to at once, from the diagonal on; None where S is added to as a whole."""
    if S.device.type != "cpu" or len(S) < 3 * BLOCK_WIDTH:
        return None
    return WIDE_BLOCK if len(S) >= WIDE else BLOCK_WIDTH


class SiteSums:
    """The sums of one site.

    Rows are held as they are while there are fewer than d of them (their rotated factor is then the smaller and exact
    form) and folded into a dense (d, d) sum from then on; or they go straight into a sketch of rank k.

    Args:
        dim: d.
        dtype: Dtype of the model's activations; sums are float32, or float64 for a float64 model.
        device: Where the sums live.
        pool: "token", or "mean" for one masked mean per example.
        sketch: k, or None for exact moments.
        dense: Go dense from the first row on.
    """

    def __init__(
        self, dim: int, dtype: torch.dtype, device: torch.device, *, pool: str, sketch: int | None, dense: bool = False
    ) -> None:
        self.dim, self.pool = dim, pool
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.count = self.padded_count = 0
        self.total = torch.zeros(dim, dtype=self.dtype, device=device)
        self.padded_total = torch.zeros_like(self.total)
        self.rows: list[Tensor] = []
        self.second = self.total.new_zeros(dim, dim) if dense else None
        self.sketch = FrequentDirections(sketch, dim, self.dtype, device) if sketch is not None else None

    def add(self, inputs: Float[Tensor, "... d"], positions: Positions) -> Tensor:
        """Add a batch.

        Returns:
            The sum of the new rows' entries: not finite exactly where an entry is not (the caller checks once a batch).

        Where memory runs out, the sums are as they were (a sketch's are not: `torch.OutOfMemoryError` ends it).
        """
        before = self.count, self.padded_count, self.total.clone(), self.padded_total.clone(), list(self.rows)
        try:
            return self._added(inputs, positions)
        except torch.OutOfMemoryError:
            self.count, self.padded_count, self.total, self.padded_total, self.rows = before
            raise

    def _added(self, inputs: Float[Tensor, "... d"], positions: Positions) -> Tensor:
        flat = inputs.detach().reshape(-1, self.dim)
        rows = flat if positions.index is None else flat.index_select(0, positions.index)
        real = rows.sum(0, dtype=self.dtype)
        self.padded_count += flat.shape[0]
        self.padded_total += real if positions.index is None else flat.sum(0, dtype=self.dtype)
        if self.pool == "mean":
            rows = means(rows.to(self.dtype), positions)
            self.total += rows.sum(0)
        else:
            self.total += real
        self.count += rows.shape[0]
        self._fold(rows)
        return real.sum()

    def _fold(self, rows: Tensor) -> None:
        if self.sketch is not None:
            self.sketch.add(rows)
            return
        if self.second is None:
            self.rows.append(rows.clone())  # the model may reuse the memory of its activations
            if self.count < self.dim:
                return
            rows, second = torch.cat(self.rows), self.total.new_zeros(self.dim, self.dim)
            add_gram(second, rows)
            self.rows, self.second = [], second
            return
        add_gram(self.second, rows)

    def finish(self) -> Moments:
        """Give the moments, where the sums lie; the sums must not be used afterwards."""
        padded = self.padded_total if bool(self.padded_total.isfinite().all()) else None
        second, form, residual, error = self._second()
        return Moments(
            self.count,
            self.total,
            second,
            form,
            residual,
            error,
            padded_count=self.padded_count,
            padded_total=padded,
        )

    def _second(self) -> tuple[Tensor, str, Tensor | None, float]:
        if self.sketch is not None:
            factor, residual, error = self.sketch.finish()
            return factor, FACTOR, residual, error
        if self.second is not None:
            mirror(self.second)
            return self.second, DENSE, None, 0.0
        rows = torch.cat([self.total.new_zeros(0, self.dim), *(r.to(self.dtype) for r in self.rows)])
        return rotated(rows), FACTOR, None, 0.0


def means(rows: Float[Tensor, "n d"], positions: Positions) -> Float[Tensor, "b d"]:
    """Take one mean per example that has a real token."""
    example = sent(positions.example, rows.device)
    length = rows.new_zeros(positions.examples).index_add_(0, example, rows.new_ones(rows.shape[0]))
    sums = rows.new_zeros(positions.examples, rows.shape[1]).index_add_(0, example, rows)
    kept = length > 0
    return sums[kept] / length[kept, None]
