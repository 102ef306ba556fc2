"""Checkpoints of adapters that are trained in one batch: where they lie, what they hold, which of them can be resumed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapters.tensor_file import write_tensors
from plait.adapters.tensors import read_tensors
from plait.disk.locks import writing_to
from plait.disk.manifest import differences, read_manifest
from plait.disk.store import canonical_json, sha256_json
from plait.errors import UsageError
from plait.progress import note
from plait.training.batched import BatchedAdapters
from plait.training.checkpoints import latest_whole, open_root, recorded_identity, said_kept, seal
from plait.training.member import Member

_STATE, _SNAPSHOT = "state.safetensors", "snapshot."


def root_of(members: Sequence[Member]) -> Path | None:
    """Name and open the folder of checkpoints, beside the first member's; None where no member asks for any."""
    if all(m.settings.checkpoint_every is None for m in members):
        return None
    root, identity = _named(members)
    open_root(root, identity)
    return root


@contextlib.contextmanager
def telling_what_is_kept(root: Path | None) -> Iterator[None]:
    """Whatever ends the steps of a batch has a note added that says where what is done is kept."""
    try:
        yield
    except BaseException as e:
        if root is not None and (kept := said_kept(root)):
            e.add_note(kept)
        raise


def let_go(members: Sequence[Member]) -> None:
    """Remove what is kept of members that do not go on together."""
    shutil.rmtree(_named(members)[0], ignore_errors=True)


def _named(members: Sequence[Member]) -> tuple[Path, Mapping[str, Any]]:
    identity = {"members": [_key(m) for m in members]}
    return Path(members[0].out).absolute().parent / f".fleet-{sha256_json(identity)[:12]}.checkpoints", identity


def _key(member: Member) -> list[Any]:
    return [str(Path(member.out).absolute()), json.loads(canonical_json(dict(member.identity)))]


def interrupted(members: Sequence[Member], todo: Sequence[Member], *, overwrite: bool = False) -> list[list[Member]]:
    """Find the batches that were being trained, or written, when a run of these members ended.

    Rounding depends on who is in a batch, so one that has written half of its members is finished as a whole. What is kept of
    fleets that have no member in `todo` stays: it is somebody else's, or a run's that is still going.

    Args:
        members: All that are asked for.
        todo: Those that are not written, which are held by this process.
        overwrite: Whether what cannot be gone on with may be lost.

    Raises:
        UsageError: It may not, and there is some: a fleet in which some of them were begun had other settings, or other members.
    """
    known = {str(Path(m.out).absolute()): m for m in members}
    wanted = {str(Path(m.out).absolute()) for m in todo}
    groups = []
    for root, recorded in fleets_in({Path(m.out).absolute().parent for m in members}):
        group = [known[out] for out in recorded if out in known and _key(known[out])[1] == recorded[out]]
        if recorded and len(group) == len(recorded) and recorded.keys() & wanted:
            groups.append(group)
            wanted -= recorded.keys()
        elif recorded and len(group) == len(recorded):
            shutil.rmtree(root)  # all of its members are written
        elif recorded.keys() & wanted:
            if not overwrite:
                _require_nothing_lost(root, recorded, known)
            shutil.rmtree(root)
    return groups


def fleets_in(folders: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """List what is kept of fleets: folder of the checkpoints, and the members' outputs with their identities.

    It lies beside the first member of a batch, wherever the others are written.
    """
    roots = sorted({root for folder in folders for root in folder.glob(".fleet-*.checkpoints")})
    return [(root, dict(recorded_identity(root).get("members", []))) for root in roots]


def _require_nothing_lost(root: Path, recorded: Mapping[str, Any], known: Mapping[str, Member]) -> None:
    """Refuse to begin anew what a fleet of other settings, or with other members, has steps of."""
    if (newest := latest_whole(root)) is None:
        return
    # Where one of its members is written it had come to its end, and was ended while it wrote the others.
    unwritten = [out for out in recorded if not _written(Path(out), recorded[out])]
    if len(unwritten) < len(recorded) and known.keys() >= set(unwritten):
        named = ", ".join(sorted(Path(out).name for out in unwritten)[:5])
        note(
            f"{root.parent}: trained already, beside others that are written, and not written itself; trained again: {named}"
        )
        return
    mine = [out for out in recorded if out in known]
    differing = list(dict.fromkeys(d for out in mine for d in differences(recorded[out], _key(known[out])[1])))
    others = [Path(out).name for out in recorded if out not in known]
    why = f"with other settings and kept at step {newest.name.rpartition('-')[2]}: {'; '.join(differing[:6])}"
    if not differing:
        named = ", ".join([*others[:5], *(["..."] if len(others) > 5 else [])])
        why = f"together with others and kept at step {newest.name.rpartition('-')[2]}: {named}"
    raise UsageError(
        f"a training was begun there {why}",
        where=mine[0],
        hint="what was asked for before goes on from it; choose another --out, or --overwrite to lose it",
    )


def _written(out: Path, identity: Mapping[str, Any]) -> bool:
    found = read_manifest(out) if out.is_dir() else None
    return found is not None and not differences(found, identity)


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
