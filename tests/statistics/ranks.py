"""Run under torchrun by test_distributed: each rank collects its share, rank 0 writes the sum."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from plait.errors import RunError
from plait.statistics import Statistics, collect_statistics, grouped, write_statistics
from plait.statistics.budget import MemoryPlan
from plait.statistics.distributed import own_share
from plait.statistics.output_gradients import with_output_gradients
from plait.statistics.passes import Batch
from tests.statistics.models import batches, build


def main(folder: str, kind: str) -> None:
    dist.init_process_group("gloo")
    model = build("llama")
    if kind == "tensors":
        split_tensors(Path(folder))
    if kind == "dead" and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    given = batches("llama", 0, examples=24)[: 3 if kind == "uneven" else 6]
    options = {"sketch": 3} if kind == "sketch" else {"pool": "mean"} if kind == "mean" else {}
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    found = collect_statistics(model, own_share(given), ["q_proj", "v_proj", "down_proj"], **options)
    if kind == "plain":
        found = with_gradients(found, given, dist.get_rank(), dist.get_world_size())
        # again within a budget, a layer at a time
        grouped.plan_memory = lambda n, *_, **__: MemoryPlan("layers", n, n, 1)
        spool = Path(folder) / f"spool-{dist.get_rank()}"
        parted = collect_statistics(model, own_share(given), ["q_proj", "v_proj", "down_proj"], memory=1, spool=spool)
        if dist.get_rank() == 0:
            write_statistics(f"{folder}/grouped-{dist.get_world_size()}", parted)
    if dist.get_rank() == 0:
        write_statistics(f"{folder}/{kind}-{dist.get_world_size()}", found)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort an orderly exit on a busy machine


def with_gradients(own: Statistics, given: Sequence[Batch], rank: int, world: int) -> Statistics:
    """The same with output gradients; what is drawn for a batch depends on its place among all."""
    answers = torch.Generator()

    def seed(number: int) -> None:
        answers.manual_seed(rank + number * world)

    return with_output_gradients(own, build("llama"), given[rank::world], before=seed, generator=answers)


def split_tensors(folder: Path) -> None:
    """Collect from a base whose weights transformers has split over the ranks; what is said to each target."""
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(folder / "base", tp_plan="auto").eval()
    said = {}
    for target in ("q_proj", "down_proj", "all-linear"):
        try:
            collect_statistics(model, batches("llama", 0), target if target == "all-linear" else [target])
        except RunError as e:
            said[target] = str(e)
    if dist.get_rank() == 0:
        (folder / "said.json").write_text(json.dumps(said))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
