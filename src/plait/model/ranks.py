"""Processes that torchrun or accelerate started together: which of them writes, and the group in which they talk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's number, 0 when it is alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Count the processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_writer() -> bool:
    """Whether this is the process that writes and speaks: the only one, or the first."""
    return rank() == 0


@contextlib.contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Within, the processes form a group (NCCL on GPUs, gloo else); nothing happens where there is only one.

    All leave at the same time, so that none cleans up what another still reads.
    """
    if world_size() < 2:
        yield
        return
    ours = not dist.is_initialized()
    if ours:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()
    finally:
        if ours:
            dist.destroy_process_group()
