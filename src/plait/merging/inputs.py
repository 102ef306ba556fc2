"""What a merging method sees: one module of all tasks, everything beyond the factors computed only when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LINEAR, LoraFactors, concatenated
from plait.merging.factors import factors_of
from plait.merging.light.threads import cores, in_threads
from plait.seeds import seed_of

if TYPE_CHECKING:
    from plait.merging.spectra.aligned import Aligned
    from plait.merging.spectra.core import CoreSpace
    from plait.statistics.fisher import Diagonal
    from plait.statistics.moments import Moments


P = ParamSpec("P")
T = TypeVar("T")


class computed(Generic[T]):  # noqa: N801 (used like property)
    """A property that each instance computes once.

    `functools.cached_property` holds one lock for all instances before Python 3.12, so that modules side by side would
    wait for each other.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        found = instance.__dict__[self.function.__name__] = self.function(instance)
        return found


class WholeModel(Protocol):
    """All modules of a merge (`plait.merging.views.Views`)."""

    def __len__(self) -> int:
        """How many there are."""

    def once(self, function: Callable[..., T], *settings: Hashable) -> T:
        """Compute a function of all modules at the first call, and remember what it gave."""

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """Make something of one module at the first call, and remember it."""


@dataclass(frozen=True)
class MergeInputs:
    """One module of all tasks, scalings folded into B. A task that does not adapt the module has rank 0 there.

    Args:
        module: Name relative to the backbone.
        tasks: Names, in the order the adapters were given.
        weights: One finite number per task, as given (1 by default).
        A: Per task (r_t, in), float32.
        B: Per task (out, r_t), float32, scaling folded in.
        kind: "linear" or "embedding".
        seed: Of the whole merge; draw from `generator`, which mixes the module's name in.
        moments: Per task, where the method needs moments.
        fisher: Per task, where the method needs the Fisher diagonal.
        output_gradients: Per task, moments of the gradients at the module's outputs, where the method needs them.
        model: All modules of the merge, for what a method decides over all of them (`over_model`); None for a module alone.
        digests: Per task, the hash of the factors as they were given (before a calibration changed them).
        members: Of a stack, its modules; their number is then the first dimension of every factor (`stacks.stack_of`).
        joined: Of a stack, the matrices (n, R, in) and (n, out, R) of which A and B are views.
    """

    module: str
    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    A: tuple[Float[Tensor, "... r in"], ...]
    B: tuple[Float[Tensor, "... out r"], ...]
    kind: str = LINEAR
    seed: int = 0
    moments: tuple[Moments, ...] = ()
    fisher: tuple[Diagonal, ...] = ()
    output_gradients: tuple[Moments, ...] = ()
    model: WholeModel | None = None
    digests: tuple[str, ...] = ()
    members: tuple[MergeInputs, ...] = ()
    joined: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B[0].shape[-2], self.A[0].shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.A[0].device

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each task, 0 where it does not adapt the module."""
        return tuple(a.shape[-2] for a in self.A)

    @property
    def total_rank(self) -> int:
        """R, the sum of the ranks."""
        return sum(self.ranks)

    @property
    def modules(self) -> int:
        """How many modules the merge has; 1 where this one stands alone."""
        return 1 if self.model is None else len(self.model)

    @property
    def side_by_side(self) -> tuple[Float[Tensor, "... R in"], Float[Tensor, "... out R"]]:
        """The A of all tasks, one below the other, and their B side by side."""
        return self.joined or (torch.cat(self.A), torch.cat(self.B, dim=1))

    @computed
    def core(self) -> CoreSpace:
        """The lossless core: every delta as a matrix of at most (R, R)."""
        from plait.merging.spectra.core import CoreSpace

        return CoreSpace.of(*self.side_by_side, self.ranks)

    @computed
    def svd_core(self) -> CoreSpace:
        """The core in the SVD basis, in which elementwise rules compare its entries."""
        from plait.merging.spectra.core import CoreSpace

        return CoreSpace.in_svd_basis(*self.side_by_side, self.ranks)

    @computed
    def aligned(self) -> Aligned:
        """KnOTS' alignment of the tasks; kept for the whole merge, since thresholds over the model need it before."""
        from plait.merging.spectra.aligned import Aligned

        def align() -> Aligned:
            return Aligned.of(self.A, self.B)

        return align() if self.model is None else self.model.kept((Aligned, self.module), align)

    def block(self, task: int, start: int, stop: int) -> Float[Tensor, "n in"]:
        """Rows [start, stop) of one task's delta; a new tensor, free to be changed in place."""
        return self.B[task][start:stop] @ self.A[task]

    def generator(self, *names: str) -> torch.Generator:
        """A CPU generator seeded by (seed, module, names): the order of the modules does not matter."""
        return torch.Generator().manual_seed(seed_of(self.seed, self.module, *names))

    @computed
    def contents(self) -> tuple[str, ...]:
        """Per task, the hash of its factors, so that draws follow the adapter and neither its name nor its place."""
        return self.digests or digests_of(self.A, self.B)

    def over_model(self, function: Callable[Concatenate[Sequence[MergeInputs], P], T], *settings: P.args) -> T:  # type: ignore[valid-type]
        """Compute something over all modules of the merge, once for all of them; over this one where it stands alone.

        Args:
            function: Modules and settings -> what is to be known, such as thresholds.
            settings: Hashable values.
        """
        return function([self], *settings) if self.model is None else self.model.once(function, *settings)  # type: ignore[call-arg]

    def with_factors(self, A: tuple[Tensor, ...], B: tuple[Tensor, ...]) -> MergeInputs:
        """The same module with other factors (a calibration)."""
        return replace(self, A=A, B=B, digests=self.contents)

    def combination(self, weights: tuple[float, ...] | list[float]) -> LoraFactors:
        """sum_t weights_t D_t by concatenation; tasks of weight 0 or rank 0 leave no rows."""
        kept = [t for t, (w, rank) in enumerate(zip(weights, self.ranks, strict=True)) if w != 0.0 and rank]
        if not kept:
            return self.zero()
        parts = [LoraFactors(self.A[t], self.B[t], 1.0, self.kind) for t in kept]
        return concatenated(parts, [weights[t] for t in kept], self.B[0].dtype, self.device)

    def zero(self) -> LoraFactors:
        """The zero delta, as rank 1: no file format knows rank 0."""
        out, width = self.shape
        like = self.A[0]
        before = like.shape[:-2]
        return factors_of(like.new_zeros(*before, 1, width), like.new_zeros(*before, out, 1), self.kind)


def digests_of(A: Sequence[Tensor], B: Sequence[Tensor]) -> tuple[str, ...]:
    """Hash each pair of factors as `digest_of` does; what lies on a GPU arrives in one piece and is hashed side by side."""
    if not A[0].is_cuda:
        return tuple(digest_of(a, b) for a, b in zip(A, B, strict=True))
    parts = [part.detach().to(torch.float32) for pair in zip(A, B, strict=True) for part in pair]
    whole = torch.split(torch.cat([part.flatten() for part in parts]).cpu(), [part.numel() for part in parts])
    here = [flat.view(part.shape) for flat, part in zip(whole, parts, strict=True)]
    pairs = list(zip(here[::2], here[1::2], strict=True))
    return tuple(in_threads(lambda pair: digest_of(*pair), pairs, cores(len(pairs)), lambda: None))


def digest_of(A: Tensor, B: Tensor) -> str:
    """Hash of a pair of factors: shapes and float32 bytes."""
    digest = hashlib.sha256(str((tuple(A.shape), tuple(B.shape))).encode())
    for part in (A, B):
        digest.update(part.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
