"""NF4, the four bits of QLoRA: what a weight becomes by them, in the numbers that bitsandbytes stores.

A weight W, row by row, is cut into blocks of 64. Each block b has a size s_b = max |w|, and each entry becomes the nearest of
sixteen values v_k, so that what is left of w is ``v_k s_b``. The values are quantiles of a normal distribution: with q(p) its
quantile function and p = 0.9677083 down to 1/2,

    v = {-q(p_i) / q(p_0), i = 0..6, of 7 steps}, 0, {q(p_i) / q(p_0), i = 7..0, of 8 steps}

so that 0 and both ends are exact. Double quantisation stores the sizes in 8 bits: with m their mean, in blocks of 256,
``s_b = m + d_j max |s - m|``, where d has 256 values: those of n binary digits, 2^n in each sign, evenly spaced within a decade, of
the decades 10^(n-6), n = 0..6, and 0 and 1.

Source: Dettmers et al., NeurIPS 2023 (arXiv:2305.14314), section 3 and appendix E; the 8-bit values: arXiv:2110.02861, section 2.1.
Tests compare with bitsandbytes bit for bit. **Deviates**: sizes take the nearest of the 256 values, as its general kernel does; its CPU
kernel looks them up in a coarser table, and one size in five hundred lands on the neighbour of the nearest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

# Entries that share a size, and sizes that share one of theirs: what bitsandbytes and QLoRA use.
BLOCK, OUTER = 64, 256
# As published (appendix E): computed anew, the last bit depends on who computes them.
_NORMAL = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_SMALLEST = 1e-38  # a block of zeros has a size of 0, by which nothing may be divided


@dataclass(frozen=True, slots=True)
class InBlocks:
    """Numbers as places in a table, with a size for each block of them.

    Args:
        places: (n,) places in the table.
        sizes: (ceil(n / block),) largest absolute value of each block, float32.
        values: The table, ascending or not.
        block: Numbers in a block.
    """

    places: UInt8[Tensor, " n"]
    sizes: Float[Tensor, " b"]
    values: Float[Tensor, " k"]
    block: int

    def numbers(self) -> Float[Tensor, " n"]:
        """Give the numbers that are left, float32: value times size."""
        values: Tensor = self.values[self.places.int()]
        scaled = _in_rows(values, self.block) * self.sizes[:, None]
        return scaled.reshape(-1)[: len(values)]


@functools.cache
def normal_values() -> Float[Tensor, 16]:
    """Give the sixteen values of NF4, ascending.

    >>> normal_values()[[0, 7, 15]].tolist()
    [-1.0, 0.0, 1.0]
    """
    return torch.tensor(_NORMAL, dtype=torch.float32)


@functools.cache
def dynamic_values() -> Float[Tensor, 256]:
    """Give the 256 values that sizes are stored in, ascending.

    >>> [round(v, 5) for v in dynamic_values()[[0, 127, 255]].tolist()]
    [-0.99297, 0.0, 1.0]
    """
    decades = []
    for digits in range(7):
        edges = _edges(2**digits + 1)
        decades.append((edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (digits - 6))
    positive = torch.cat(decades)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0], dtype=torch.float32)]).sort().values


def _edges(n: int) -> Float[Tensor, " n"]:
    """Numbers from 0.1 to 1 in equal steps, as torch.linspace has them where a product and a sum are rounded once."""
    first, last = torch.tensor([0.1, 1.0], dtype=torch.float32)
    step, places = ((last - first) / (n - 1)).double(), torch.arange(n, dtype=torch.float64)
    forwards, backwards = first.double() + step * places, last.double() - step * (n - 1 - places)
    return torch.where(places < n // 2, forwards, backwards).float()


def in_blocks(x: Float[Tensor, " n"], values: Float[Tensor, " k"], block: int) -> InBlocks:
    """Put each number at the nearest value of an ascending table, relative to the largest of its block."""
    rows = _in_rows(x.float(), block)
    sizes = rows.abs().amax(1)
    relative = (rows * (1.0 / sizes.clamp_min(_SMALLEST))[:, None]).clamp_(-1, 1)
    between = (values[:-1] + values[1:]) / 2
    places = torch.bucketize(relative, between.to(relative.device), out_int32=True).to(torch.uint8)
    return InBlocks(places.reshape(-1)[: x.numel()], sizes, values.to(x.device), block)


def stored_sizes(sizes: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Give what double quantisation leaves of the blocks' sizes."""
    mean = sizes.mean()
    return in_blocks(sizes - mean, dynamic_values(), OUTER).numbers() + mean


def through_nf4(weight: Float[Tensor, "out in"], *, double: bool = True) -> Float[Tensor, "out in"]:
    """Quantise a weight to NF4 and back: what a layer in four bits multiplies by.

    Args:
        weight: As the layer multiplies by it, one row an output; of 16 or 32 bits.
        double: Whether the sizes of the blocks are stored in 8 bits, as QLoRA does.

    Returns:
        The same shape and dtype.

    Cost: about 15 bytes an entry while it runs.
    """
    quantised = in_blocks(weight.contiguous().reshape(-1), normal_values(), BLOCK)
    if double:
        quantised = InBlocks(quantised.places, stored_sizes(quantised.sizes), quantised.values, BLOCK)
    return quantised.numbers().reshape(weight.shape).to(weight.dtype)


def _in_rows(x: Tensor, block: int) -> Tensor:
    """(blocks, block), the last one filled up with zeros."""
    short = -len(x) % block
    return torch.nn.functional.pad(x, (0, short)).view(-1, block)
