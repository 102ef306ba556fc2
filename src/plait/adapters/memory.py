"""Memory that goes back to the system: blocks mapped for themselves, outside malloc."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from plait.adapters.arrays import Array

if TYPE_CHECKING:
    from torch import Tensor

_HUGE, _MANY = 1 << 21, 8  # bytes of a huge page; how many of them make one more little


def own_block(size: int) -> mmap.mmap:
    """Bytes mapped for themselves, that many or a few more: a block given back to malloc has it keep all later ones of that size."""
    # No rest of hundreds of small pages, where a huge one more is little.
    whole = -(-size // _HUGE) * _HUGE if size > _MANY * _HUGE else max(1, size)
    block = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux; the faults of small pages cost as much as the copying
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def own_memory(size: int) -> Tensor:
    """Bytes mapped for themselves, as a tensor; see `own_block`."""
    from torch import frombuffer, uint8

    return frombuffer(own_block(size), dtype=uint8)[:size]


def empty_like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor of another's dtype and device; on the CPU, in memory of its own."""
    if tensor.device.type != "cpu":
        return tensor.new_empty(shape)
    return own_memory(math.prod(shape) * tensor.itemsize).view(tensor.dtype).view(shape)


_again = threading.local()


def again_like(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """As `empty_like`, in memory that this thread had before under a name, once nobody holds that any more.

    Of large results that follow each other: the system clears every page that it gives, which takes as long as a pass over them.
    """
    size = math.prod(shape) * tensor.itemsize
    if tensor.device.type != "cpu" or not size:
        return empty_like(tensor, shape)
    from torch import frombuffer

    block: mmap.mmap | None = getattr(_again, name, None)
    if block is None or len(block) < size or sys.getrefcount(block) > 2 + 1:  # held by us twice, and by the call
        block = own_block(size)
        setattr(_again, name, block)
    return frombuffer(block, dtype=tensor.dtype, count=math.prod(shape)).view(shape)


def own_copy(tensor: Tensor) -> Tensor:
    """A copy in memory of its own: what outlives the temporaries around it must not keep malloc from giving them back."""
    return empty_like(tensor, tuple(tensor.shape)).copy_(tensor)


def give_back() -> None:
    """Have malloc give unused pages back to the system: each thread's heap keeps what it once needed (glibc; else nothing).

    What `again_like` keeps for this thread goes too.
    """
    _again.__dict__.clear()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def let_go(*tensors: Tensor | Array) -> None:
    """Have the system take back the pages of tensors that lie in a mapped file: whoever reads them again finds them in the file.

    Arrays in memory of their own, such as copies of what a file does not align, are left alone: their pages would come back as zeros.
    Whether a tensor of torch's lies in a file is for the caller to know.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for tensor in tensors:
            if _is_own(tensor):
                continue
            first = tensor.data.ctypes.data if isinstance(tensor, Array) else tensor.data_ptr()
            start, stop = (
                -(-first // mmap.PAGESIZE) * mmap.PAGESIZE,
                (first + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE,
            )
            if stop > start:
                madvise(start, stop - start, mmap.MADV_DONTNEED)


def _is_own(tensor: Tensor | Array) -> bool:
    """Whether an array lies in memory that NumPy asked for, and not in a buffer that it was given."""
    if not isinstance(tensor, Array):
        return False
    data = tensor.data
    while isinstance(data.base, type(data)):
        data = data.base
    return bool(data.flags.owndata)


def available_memory() -> int | None:
    """Bytes this process may still take, as the system tells it: free pages, within its group's limit; None where it does not."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max"
            found.append(int(Path(limit).read_text(encoding="ascii")))
    return min(found, default=None)


def bytes_of(tensor: Tensor | Array) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    if isinstance(tensor, Array):
        return memoryview(tensor.data.reshape(-1)).cast("B")  # type: ignore[arg-type]
    from torch import uint8

    return tensor.detach().reshape(-1).view(uint8).numpy().data
