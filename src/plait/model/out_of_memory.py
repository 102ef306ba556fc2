"""Out of memory in the middle of the work: half the batch, and on; said, never in silence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from plait.errors import EnvironmentFault
from plait.progress import note

S = TypeVar("S")
T = TypeVar("T")


def by_parts(call: Callable[[Sequence[S]], T], rows: Sequence[S], size: int, what: str) -> list[T]:
    """Call a function on consecutive parts of the rows; where memory runs out, parts are half as long from then on.

    >>> by_parts(sum, [1, 2, 3, 4, 5], 2, "added")
    [3, 7, 5]

    Args:
        call: Takes at most `size` rows; called again with fewer of them after `torch.OutOfMemoryError`.
        rows: Rows in the order in which they are taken.
        size: Rows a call.
        what: What is done with a row, for the message, such as "scored".

    Returns:
        The results, in order.

    Raises:
        EnvironmentFault: One row alone does not fit.
    """
    results: list[T] = []
    start = 0
    while start < len(rows):
        part = rows[start : start + size]
        done, result = _tried(call, part)
        if not done:
            size = half_of(len(part), what)
            continue
        results.append(result)  # type: ignore[arg-type]
        start += len(part)
    return results


def _tried(call: Callable[[Sequence[S]], T], part: Sequence[S]) -> tuple[bool, T | None]:
    """The result, or that there was none; the error is let go of here, and with it what its frames held."""
    try:
        return True, call(part)
    except torch.OutOfMemoryError:
        return False, None


def half_of(size: int, what: str) -> int:
    """Half a batch that did not fit, after giving unused blocks of memory back and saying so.

    Raises:
        EnvironmentFault: It was of one row.
    """
    if size < 2:
        raise EnvironmentFault("out of memory with one row at a time", hint="shorter rows, or --device cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    note(f"out of memory with {size} rows at a time: {what} {size // 2} at a time from here on")
    return size // 2


def split(batch: Mapping[str, Any], size: int, most: int) -> list[dict[str, Any]]:
    """Cut a batch of `size` examples into batches of at most `most`: tensors over examples are cut, everything else goes along.

    >>> [part["ids"].tolist() for part in split({"ids": torch.tensor([1, 2, 3])}, 3, 2)]
    [[1, 2], [3]]
    """

    def cut(value: Any, start: int) -> Any:
        return value[start : start + most] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    return [{k: cut(v, start) for k, v in batch.items()} for start in range(0, size, most)]
