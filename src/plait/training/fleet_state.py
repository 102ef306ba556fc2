"""Checkpoints of adapters that are trained in one batch: where they lie, what they hold, which of them can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapters.tensor_file import write_tensors
from plait.adapters.tensors import read_tensors
from plait.disk.locks import writing_to
from plait.disk.store import canonical_json, sha256_json
from plait.training.batched import BatchedAdapters
from plait.training.checkpoints import latest_whole, open_root, recorded_identity, seal
from plait.training.member import Member

_STATE, _SNAPSHOT = "state.safetensors", "snapshot."


def root_of(members: Sequence[Member]) -> Path | None:
    """Name and open the folder of checkpoints, beside the first member's; None where no member asks for any."""
    if all(m.settings.checkpoint_every is None for m in members):
        return None
    identity = {"members": [_key(m) for m in members]}
    root = Path(members[0].out).absolute().parent / f".fleet-{sha256_json(identity)[:12]}.checkpoints"
    open_root(root, identity)
    return root


def _key(member: Member) -> list[Any]:
    return [str(Path(member.out).absolute()), json.loads(canonical_json(dict(member.identity)))]


def interrupted(members: Sequence[Member], todo: Sequence[Member]) -> list[list[Member]]:
    """Find the batches that were being trained, or written, when a run of these members ended.

    Rounding depends on who is in a batch, so one that has written half of its members is finished as a whole.
    """
    known = {str(Path(m.out).absolute()): m for m in members}
    wanted = {str(Path(m.out).absolute()) for m in todo}
    groups = []
    for root in sorted({p for m in todo for p in Path(m.out).absolute().parent.glob(".fleet-*.checkpoints")}):
        recorded = recorded_identity(root).get("members", [])
        group = [known[out] for out, identity in recorded if out in known and _key(known[out])[1] == identity]
        names = {out for out, _ in recorded}
        if recorded and len(group) == len(recorded) and names & wanted:
            groups.append(group)
            wanted -= names
        else:
            shutil.rmtree(root)  # of other settings, or with other members: nothing can be resumed from it
    return groups


def save_state(
    root: Path, step: int, batched: BatchedAdapters, losses: Tensor, snapshots: Mapping[int, Tensor]
) -> None:
    """Write the trained numbers, the optimiser's state, losses and snapshots as the checkpoint of a step."""
    flat, stage = batched.parameters, root / "staging"
    state = {"values": flat.values, "first": flat.first, "second": flat.second, "losses": losses}
    state |= {f"{_SNAPSHOT}{n}": values for n, values in snapshots.items()}
    # As integers: a member that has left the numbers must not keep the others from being saved.
    with writing_to(root):
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        write_tensors(stage / _STATE, {k: v.view(torch.int32) for k, v in state.items()})
        seal(stage, root / f"checkpoint-{step}")


def restore_state(root: Path, batched: BatchedAdapters, losses: Tensor, snapshots: dict[int, Tensor]) -> int:
    """Load the newest whole checkpoint; returns the step to resume at."""
    checkpoint = latest_whole(root)
    if checkpoint is None:
        return 0
    flat = batched.parameters
    state = {k: v.view(torch.float32) for k, v in read_tensors(checkpoint / _STATE)[0].items()}
    for name in ("values", "first", "second"):
        getattr(flat, name).copy_(state[name])
    losses.copy_(state["losses"])
    snapshots |= {int(k.removeprefix(_SNAPSHOT)): v for k, v in state.items() if k.startswith(_SNAPSHOT)}
    flat.refresh()
    return int(checkpoint.name.rpartition("-")[2])
