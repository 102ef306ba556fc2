"""A frozen base split over processes (FSDP2), its adapter and head whole in each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_TRAINED = ("lora_", "modules_to_save.")  # PEFT's names of what an adapter adds; everything else is the base


def shard_base(peft_model: Any, device: torch.device) -> None:
    """Split a PeftModel's frozen weights over the processes of the default group, in place.

    Each process holds 1/n of every base weight, and gathers one transformer block at a time while it is at work. The
    adapter's tensors stay whole and plain, so constraints, clipping, checkpoints and `detach` see what they always see,
    and DDP, which is told of nothing else, averages their gradients.

    Args:
        peft_model: From `plait.training.peft_model.attach`; may be on the CPU, blocks are moved as they are split.
        device: This process's.

    Cost: one all-gather of every block in the forward and one in the backward pass; no reduction, the base has no
    gradients.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # No other name for a base weight may live on here: its whole copy would stay on the GPU beside its share.
    kept = {p for name, p in peft_model.named_parameters() if any(part in name for part in _TRAINED)}
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    base = peft_model.get_base_model()
    for block in blocks_of(base):
        fully_shard(block, mesh=mesh, ignored_params=kept)
    fully_shard(base, mesh=mesh, ignored_params=kept)
    split = [name for name, p in peft_model.named_parameters() if p not in kept]
    buffers = [name for name, _ in peft_model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(peft_model, [*split, *buffers])  # type: ignore[no-untyped-call]


def average_adapter(accelerator: Any) -> None:
    """Make an Accelerator wrap a model that `shard_base` has split in DDP, which averages the adapter's gradients.

    Left alone it refuses on GPUs, since the base's weights are DTensors; DDP is told to ignore them.

    Args:
        accelerator: The Trainer's; changed in place.
    """
    from torch.nn.parallel import DistributedDataParallel

    prepare = accelerator.prepare_model

    def prepare_model(model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        prepared = prepare(model, device_placement=False, evaluation_mode=True)  # mixed precision, and no wrapping
        if not evaluation_mode:
            handler = accelerator.ddp_handler
            prepared = DistributedDataParallel(prepared, **(handler.to_kwargs() if handler is not None else {}))
            accelerator._models[-1] = prepared
        prepared._is_accelerate_prepared = True
        return prepared

    accelerator.prepare_model = prepare_model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Find the transformer blocks: members of the outermost module lists."""
    blocks: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            blocks += list(module)
            inside |= {id(m) for block in module for m in block.modules()}
    return blocks
