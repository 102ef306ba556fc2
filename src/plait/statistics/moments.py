"""Second moments and their arithmetic: a commutative monoid per site, with no I/O and no model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int8, Shaped
from torch import Tensor

from plait.adapters.one_thread import in_one_thread
from plait.border.counts import plural
from plait.errors import InputError

DENSE, FACTOR = "dense", "factor"


@dataclass(frozen=True, slots=True)
class Moments:
    """Uncentred sums over the inputs of one site, S = sum of h h^T, exact or sketched.

    >>> one = Moments(1, torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    >>> two = one.merge(one)
    >>> two.count, two.trace
    (2, 2.0)

    Args:
        count: Number of inputs: real tokens, or examples where the pool is "mean".
        total: (d,) sum of h.
        second: (d, d) the sum S itself where `form` is "dense"; (k, d) a factor F with S = F^T F where it is "factor",
            rotated so that no row is an input.
        form: "dense" or "factor".
        residual: (d,) non-negative diagonal added to F^T F; None unless sketched.
        tail, step: What a fine sketch keeps of the rest off the diagonal, as correlations: the packed upper triangle
            of codes c with rest_ij = step c_ij |c_ij| sqrt(residual_i residual_j); squares are finer where most lie.
        error: Bound on the spectral norm of what a sketch left out, in the units of S; 0 where exact.
        padded_count, padded_total: Count and sum over all positions, pads included (`osrm_released` alone
            reads them); None where pads held NaN.
    """

    count: int
    total: Float[Tensor, " d"]
    second: Float[Tensor, "k d"]
    form: str = DENSE
    residual: Float[Tensor, " d"] | None = None
    error: float = 0.0
    tail: Int8[Tensor, " n"] | None = None
    step: float = 0.0
    padded_count: int = 0
    padded_total: Float[Tensor, " d"] | None = None

    def __repr__(self) -> str:
        """Its sizes, not its numbers."""
        return f"Moments(count={self.count}, dim={self.dim}, form={self.form!r})"

    @classmethod
    def zero(cls, dim: int, dtype: torch.dtype = torch.float32) -> Moments:
        """Make the identity of `merge`: no inputs."""
        empty = torch.zeros(dim, dtype=dtype)
        return cls(0, empty, empty.new_zeros(0, dim), FACTOR, padded_total=empty)

    @property
    def dim(self) -> int:
        """d, the width of the site."""
        return self.total.shape[0]

    @property
    def sketched(self) -> bool:
        """Whether something was left out; `error` bounds it."""
        return self.error > 0 or self.residual is not None

    @property
    def trace(self) -> float:
        """The trace of S: the sum of the squared norms; kept by every sketch."""
        if self.form == DENSE:
            return float(self.second.diagonal().sum(dtype=torch.float64))
        rest = 0.0 if self.residual is None else float(self.residual.sum(dtype=torch.float64))
        return float(self.second.square().sum(dtype=torch.float64)) + rest

    def dense(self) -> Float[Tensor, "d d"]:
        """S as one matrix."""
        if self.form == DENSE:
            return self.second
        S = self.second.T @ self.second
        if self.residual is None:
            return S
        if self.tail is not None:
            spread = self.residual.sqrt()
            codes = unpacked(self.tail, self.dim).to(S)
            S = S + codes * codes.abs() * (self.step * spread[:, None] * spread)
        return S + torch.diag(self.residual)

    def normalised(self, dtype: torch.dtype | None = None) -> Float[Tensor, "d d"]:
        """Give the trace-normalised m = S / tr S, so that tasks compare.

        Raises:
            InputError: All inputs are zero, or there are none.
        """
        trace = self.trace
        if not trace > 0:
            raise InputError(
                f"the second moment of {plural(self.count, 'input')} is zero", hint="a dead layer, or no data"
            )
        S = self.dense()
        return S.to(dtype or S.dtype) / trace

    def to(self, device: torch.device | str) -> Moments:
        """Move the moments to another device."""
        residual = None if self.residual is None else self.residual.to(device)
        padded = None if self.padded_total is None else self.padded_total.to(device)
        tail = None if self.tail is None else self.tail.to(device)
        second, total = self.second.to(device), self.total.to(device)
        return replace(self, total=total, second=second, residual=residual, tail=tail, padded_total=padded)

    def project(self, X: Float[Tensor, "k d"]) -> Float[Tensor, "k k"]:
        """X S X^T, in X's device and dtype; from a factor without forming S."""
        if self.form == DENSE or self.tail is not None:
            return X @ self.dense().to(X) @ X.T
        Y = X @ self.second.to(X).T
        rest = 0.0 if self.residual is None else (X * self.residual.to(X)) @ X.T
        return Y @ Y.T + rest

    def merge(self, other: Moments) -> Moments:
        """Add the moments of both sets of inputs: associative, commutative, with `zero` as identity, up to rounding.

        A merge never compresses: factors are stacked and rotated, and become dense where they would not be smaller.

        Raises:
            InputError: Different widths.
        """
        if self.dim != other.dim:
            raise InputError(f"moments of width {self.dim} and {other.dim} cannot be added")
        second, form, residual = _sum_of_seconds(self, other)
        known = self.padded_total is not None and other.padded_total is not None
        return Moments(
            count=self.count + other.count,
            total=self.total + other.total,
            second=second,
            form=form,
            residual=residual,
            error=self.error + other.error,
            padded_count=self.padded_count + other.padded_count,
            padded_total=self.padded_total + other.padded_total if known else None,  # type: ignore[operator]
        )


def _sum_of_seconds(a: Moments, b: Moments) -> tuple[Tensor, str, Tensor | None]:
    rows = a.second.shape[0] + b.second.shape[0]
    if DENSE in (a.form, b.form) or rows >= a.dim or a.tail is not None or b.tail is not None:
        return a.dense() + b.dense(), DENSE, None
    known = [m.residual for m in (a, b) if m.residual is not None]
    residual = functools.reduce(torch.add, known) if known else None
    return rotated(torch.cat([a.second, b.second])), FACTOR, residual


def packed(S: Shaped[Tensor, "d d"]) -> Shaped[Tensor, " n"]:
    """Take the upper triangle, row by row.

    >>> packed(torch.tensor([[1, 2], [2, 3]])).tolist()
    [1, 2, 3]
    """
    rows, columns = torch.triu_indices(*S.shape, device=S.device)
    return S[rows, columns]


def unpacked(triangle: Shaped[Tensor, " n"], dim: int) -> Shaped[Tensor, "d d"]:
    """Make the symmetric matrix of an upper triangle.

    >>> unpacked(torch.tensor([1, 2, 3]), 2).tolist()
    [[1, 2], [2, 3]]
    """
    rows, columns = torch.triu_indices(dim, dim, device=triangle.device)
    S = triangle.new_empty(dim, dim)
    S[rows, columns] = triangle
    S[columns, rows] = triangle
    return S


def rotated(rows: Float[Tensor, "n d"]) -> Float[Tensor, "k d"]:
    """Make a factor with the same F^T F and no trace of the single rows.

    The R of a thin QR decomposition, with a positive diagonal: it is the Cholesky factor of S, a function of S alone.
    """
    if rows.shape[0] == 0:
        return rows
    R: Tensor = in_one_thread(torch.linalg.qr, rows, mode="r").R
    signs = 1 - 2 * (R.diagonal() < 0).to(R.dtype)
    return signs[:, None] * R


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One target module.

    Args:
        site: Name of the site it reads.
        shape: (out, in) of the weight, whatever way round the model stores it.
        output_energy: tr(W0 S W0^T), the summed squared norm of its outputs without bias: a sum, so that it adds.
        fan_in_fan_out: Whether the model stores the weight as (in, out) (Conv1D).
        is_router: Whether it is no linear layer, but a matrix that PEFT adapts as a parameter.
    """

    site: str
    shape: tuple[int, int]
    output_energy: float
    fan_in_fan_out: bool = False
    is_router: bool = False


@dataclass(frozen=True, slots=True)
class Statistics:
    """What one task feeds into every target module of one base model.

    >>> statistics = Statistics({}, {"layer.0.query": ModuleInfo("layer.0", (2, 2), 1.0)}, {"backbone_prefix": "bert"})
    >>> statistics.relative("bert.layer.0.query")
    'layer.0.query'
    >>> statistics
    Statistics(1 module, 0 sites)

    Args:
        sites: Site -> moments. A site is one distinct input and is named after the first module that reads it.
        modules: Module name, relative to the backbone -> `ModuleInfo`.
        provenance: Base, hashes, target modules, pool, samples, tokens, template, dtype, backbone_prefix, task,
            task_type (PEFT's, of the model that was run), schema.
        sha256: Hash of the file they were read from, "" where there is none.
        output_gradients: Module, relative to the backbone -> moments of the gradients at its output, whose second moment is
            the output side of K-FAC (`plait.statistics.output_gradients`); empty where nobody asked for them.
    """

    sites: Mapping[str, Moments]
    modules: Mapping[str, ModuleInfo]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""
    output_gradients: Mapping[str, Moments] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Whose it is and how large, not its numbers."""
        task = f"task={self.provenance['task']!r}, " if "task" in self.provenance else ""
        return f"Statistics({task}{plural(len(self.modules), 'module')}, {plural(len(self.sites), 'site')})"

    def moments_for(self, module: str) -> Moments | None:
        """Moments of what a module reads; the name may carry the recorded backbone prefix. None where unknown."""
        info = self.modules.get(self.relative(module))
        return None if info is None else self.sites[info.site]

    def output_gradients_for(self, module: str) -> Moments | None:
        """Find the moments of the gradients at a module's output, by a name as `moments_for` takes it; None where unknown."""
        return self.output_gradients.get(self.relative(module))

    def relative(self, module: str) -> str:
        """Strip a module's name of the recorded backbone prefix."""
        prefix = self.provenance.get("backbone_prefix")
        return module.removeprefix(f"{prefix}.") if prefix and module not in self.modules else module
