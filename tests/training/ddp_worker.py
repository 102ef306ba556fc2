"""Run by torchrun: trains one adapter in several processes.

Arguments: base folder, statistics folder, out, constraint; "split" after them splits the base over the processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
import weakref
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor

from plait.disk.store import identity
from plait.model.base import BaseModel
from plait.statistics import read_statistics
from plait.training import TrainingSettings, sharding, train, train_adapter
from tests.tiny import make_adapter, make_examples, make_task

OPTIONS = {"free": {}, "frozen": {}, "projected": {"m": 6}, "penalised": {"beta": 0.5}}
SETTINGS = TrainingSettings(steps=10, lr=5e-3, batch_size=8, max_length=24, accumulation=2, checkpoint_every=4)


def main(folder: str, statistics: str, out: str, constraint: str, split: str = "") -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base, task = BaseModel(folder, device="cpu"), make_task()
    if split:
        watch_sizes(Path(out))
        Accelerator.multi_device = property(lambda self: True)  # as on GPUs, where accelerate wraps no DTensors
    known = {p.name: read_statistics(p) for p in sorted(Path(statistics).iterdir())}
    settings = dataclasses.replace(SETTINGS, constraint=constraint, constraint_options=OPTIONS[constraint])
    settings = dataclasses.replace(settings, shard_base=bool(split))
    train_adapter(
        make_adapter(base, task, Path(folder).name), task, make_examples(task), base, settings,
        seed=0, out=Path(out), identity=identity("train", {"c": constraint}, seed=0), statistics=known,
    )  # fmt: skip


def local_numbers(model):
    """Count a model's numbers that lie in this process."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())


def watch_sizes(out: Path) -> None:
    """Note how many numbers this process holds before and after the base is split, and which whole weights outlive it."""
    whole, split = sharding.shard_base, fsdp.fully_shard
    known = {"split": [], "outlived": []}

    def noted(model, device):
        before = local_numbers(model)
        whole(model, device)
        known["sizes"] = [before, local_numbers(model)]
        out.with_name(f"split-{os.environ['RANK']}.json").write_text(json.dumps(known))

    def watched(block, *, ignored_params, **options):
        frozen = {n: weakref.ref(p) for n, p in block.named_parameters() if p not in ignored_params}
        frozen = {n: ref for n, ref in frozen.items() if not isinstance(ref(), DTensor)}  # not of a block split before
        split(block, ignored_params=ignored_params, **options)
        known["split"].append(len(frozen))
        known["outlived"] += [n for n, ref in frozen.items() if ref() is not None]

    train.shard_base, fsdp.fully_shard = noted, watched


if __name__ == "__main__":
    main(*sys.argv[1:])
