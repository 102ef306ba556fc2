"""Computing in one thread of torch's: what LAPACK gives depends on how many there are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_one_thread(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call a function while torch computes in the calling thread alone.

    For decompositions (eigenvectors, singular values, QR, Cholesky) and solves with a matrix that is yet to be decomposed: LAPACK's
    blocks follow the number of threads, and with them the last bits, also where MKL is told to add up products in one order
    (`MKL_CBWR`). What is chosen or cut by such bits differs in more. Solves with a triangle are products, and need none of this.

    Args:
        function: What is called, such as `torch.linalg.eigh`.
        arguments: Passed on.
        options: Passed on.

    Cost: one core does the work. On the CPU decompositions profit little from more; those of a GPU do not notice.
    """
    with alone():
        return function(*arguments, **options)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Have torch compute in the calling thread alone; the setting, which holds for the process, is put back."""
    import torch  # here: sums of folders read adapters without it

    threads = torch.get_num_threads()
    if threads == 1:  # so too in a worker, whose setting is its own
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
