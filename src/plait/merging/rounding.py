"""The type in which a merge is written: the inputs' own, where they agree on one of 16 bits; and what rounding to it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from plait.adapters.arrays import BFLOAT16, FLOAT16, FLOAT32, KEEP, all_finite, array_of, require_left
from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import RunError
from plait.merging.light.sums import Probes, probes_by_width, rounding, taken
from plait.options import require_known

if TYPE_CHECKING:
    from plait.merging.record import MergeRecord

DTYPES = (KEEP, FLOAT32, BFLOAT16, FLOAT16)


def checked_dtype(name: str) -> str:
    """A name in `DTYPES`.

    Raises:
        UsageError: Another.
    """
    require_known(name, DTYPES, "dtype")
    return name


def dtype_for(asked: str, adapters: Sequence[Adapter], *, unchanged: bool = False) -> str:
    """Say in which type a merge's factors are written: "float32", "bfloat16" or "float16".

    Args:
        asked: A name in `DTYPES`. "keep" is the type of all inputs' factors where they have one, and it is of 16 bits; else
            float32, in which merges are computed.
        adapters: The inputs.
        unchanged: Whether the result is the one input as it is, whatever its type: then "keep" is the answer.

    Raises:
        UsageError: An unknown name.
    """
    if checked_dtype(asked) != KEEP or unchanged:
        return asked
    kinds = {str(t.dtype).removeprefix("torch.") for a in adapters for f in a.modules.values() for t in (f.A, f.B)}
    only = kinds.pop() if len(kinds) == 1 else FLOAT32
    return only if only in (BFLOAT16, FLOAT16) else FLOAT32


class Rounding:
    """Rounds the modules of one merge, from any thread, and knows what that took.

    Args:
        dtype: The type to round to; "keep" leaves everything as it is.
        widths: Widths of the modules' inputs.
        seed: Seed of the directions on which the error is measured.
    """

    def __init__(self, dtype: str, widths: Iterable[int], seed: int) -> None:
        self.dtype = dtype
        self._probes: Mapping[int, Probes] = probes_by_width(widths, seed) if self.rounds else {}
        self._parts: dict[str, tuple[float, float | Callable[[], float]]] = {}

    @property
    def rounds(self) -> bool:
        """Whether the type has fewer digits than merges are computed in."""
        return self.dtype in (BFLOAT16, FLOAT16)

    def stored(self, module: str, factors: LoraFactors) -> LoraFactors:
        """A module's factors in the type, tensors of torch.

        Raises:
            RunError: A number that the type does not hold.
        """
        if self.dtype == KEEP:
            return factors
        import torch

        kind = getattr(torch, self.dtype)
        short = replace(factors, A=factors.A.to(kind), B=factors.B.to(kind))
        if self.rounds:
            if not all_finite(array_of(short.A)) or not all_finite(array_of(short.B)):
                raise overflow(self.dtype, module)
            self.note(module, factors, short)
        return short

    def note(self, module: str, exact: LoraFactors, short: LoraFactors) -> None:
        """Measure what rounding took from one module, where anything can be taken."""
        if self.rounds:
            self._parts[module] = rounding(exact, short, self._probes[exact.shape[1]])

    def probes_of(self, width: int) -> Probes:
        """Give the directions on which what rounding takes from a module of this width is measured."""
        return self._probes[width]

    def note_taken(self, module: str, taken: tuple[float, float | Callable[[], float]]) -> None:
        """Take note of what `plait.merging.light.rounded_sums.rounded_sum` says of one module."""
        self._parts[module] = taken

    @property
    def error(self) -> float | None:
        """|D' - D| / |D| of the whole model, on random inputs; None where nothing is rounded."""
        if not self.rounds:
            return None
        parts = [self._parts[m] for m in sorted(self._parts)]
        if not any(error for error, _ in parts):
            return 0.0
        return taken([(error, size() if callable(size) else size) for error, size in parts])

    @property
    def identity(self) -> dict[str, str]:
        """What the identity of a merge says of its type: nothing of float32, which earlier merges all were."""
        return {"dtype": self.dtype} if self.rounds else {}

    def noted(self, record: MergeRecord) -> MergeRecord:
        """A record with the type and what rounding took.

        Raises:
            RunError: It took the greater part of the update.
        """
        if not self.rounds:
            return record
        error = self.error
        require_left(self.dtype, error or 0.0)
        return replace(record, dtype=self.dtype, rounding_error=error)


def overflow(dtype: str, module: str) -> RunError:
    """What is raised where a number of a merge is too large for its type."""
    return RunError(f"the merge overflows {dtype}", where=module, hint="--dtype float32")


def in_dtype(adapter: Adapter, asked: str, inputs: Sequence[Adapter], seed: int = 0) -> tuple[Adapter, Rounding]:
    """An adapter that lies in memory, in the type in which it is written; and what rounding to it took.

    Args:
        adapter: The result, in float32, or an input as it is.
        asked: See `dtype_for`.
        inputs: What it was made of.
        seed: See `Rounding`.
    """
    unchanged = len(inputs) == 1 and all(f is adapter.modules.get(m) for m, f in inputs[0].modules.items())
    took = Rounding(dtype_for(asked, inputs, unchanged=unchanged), {f.shape[1] for f in adapter.modules.values()}, seed)
    ready = {m: _scaled_first(f) if took.rounds else f for m, f in adapter.modules.items()}
    return replace(adapter, modules={m: took.stored(m, f) for m, f in ready.items()}), took


def _scaled_first(factors: LoraFactors) -> LoraFactors:
    """A module whose alpha is no whole number with its scaling in B: a file has it there, and would round B a second time."""
    alpha = factors.scaling * factors.rank
    return factors if alpha == round(alpha) else factors.folded()
