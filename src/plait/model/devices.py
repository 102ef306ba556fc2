"""The devices that a model may run on, by what a user calls them."""

from __future__ import annotations

import os
import re

import torch

from plait.errors import EnvironmentFault, UsageError


def device_named(name: str) -> torch.device:
    """Find a device by what a user calls it: auto, cpu, cuda, cuda:1; under torchrun a GPU without a number is the process's own.

    Raises:
        UsageError: No such device.
        EnvironmentFault: No GPU that torch can use.
    """
    if name == "auto":
        return _own_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not re.fullmatch(r"(cpu|cuda)(:\d{1,3})?", name):
        raise UsageError(f"unknown device {name!r}", hint="auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault("no GPU that torch can use", where=f"device {name}", hint="use --device cpu")
    return _own_gpu(device)


def _own_gpu(device: torch.device) -> torch.device:
    """Under torchrun, the GPU of this process, where none is named."""
    rank = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", int(rank)) if device.type == "cuda" and device.index is None and rank else device


def free_memory(device: torch.device) -> int:
    """Count the bytes of a GPU that this process may still take: what is free, within the share of it that torch was given.

    Who uses a GPU with others gives a share by `torch.cuda.set_per_process_memory_fraction`. What torch holds and does not use
    counts as free.
    """
    free, total = torch.cuda.mem_get_info(device)
    held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    share_of = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)
    number = torch.cuda.current_device() if device.index is None else device.index  # this one takes no device without
    return max(0, min(free + held - used, int(share_of(number) * total) - used))
