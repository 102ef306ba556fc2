"""Checkpoints that are whole or absent: staged, sealed with the hashes of their files, and looked up newest first."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.adapters.lora import Adapter
from plait.disk.durable import make_above
from plait.disk.locks import writing_to
from plait.disk.space import in_units
from plait.disk.store import canonical_json, differences, read_json, sha256_file
from plait.errors import PlaitError, UsageError
from plait.training.settings import TrainingSettings

SEAL = "complete.json"
_IDENTITY, _PARTIAL = "identity.json", "identity.partial"
KEPT_CHECKPOINTS = 2  # the newest, and the one before it for the day the newest turns out damaged


def checkpoint_root(out: Path) -> Path:
    """Name the folder in which the checkpoints of a run that writes `out` lie until it is finished."""
    out = out.absolute()
    return out.parent / f".{out.name}.checkpoints"


def run_name(root: Path) -> str:
    """Name the adapter that a run with these checkpoints writes.

    >>> run_name(checkpoint_root(Path("adapters/sst2")))
    'sst2'
    """
    return root.name.removeprefix(".").removesuffix(".checkpoints")


def bytes_of_training(initial: Adapter, settings: TrainingSettings, *, begins: bool) -> int:
    """Bytes that a training writes at least, known before it starts.

    Args:
        initial: What it starts from: the trained adapter and each snapshot are as large.
        settings: Whether there are checkpoints: each holds the weights and two moments of the optimiser for every weight.
        begins: Whether no checkpoint is on the disk yet, as those of an interrupted run are.
    """
    adapters = 1 + len(settings.snapshots)
    return initial.nbytes * (adapters + (3 if begins and settings.checkpoint_every is not None else 0))


def require_ours(root: Path) -> None:
    """Refuse what stands where checkpoints go and is none of plait's; nothing, and a folder that was only just made, pass.

    Args:
        root: Folder of the checkpoints, which may be removed afterwards.

    Raises:
        UsageError: A link, a file, or a folder without the mark of a run that holds what no run puts there.
    """
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        what = "a link" if root.is_symlink() else "a file"
    elif root.is_dir() and not (root / _IDENTITY).is_file() and not {p.name for p in root.iterdir()} <= {_PARTIAL}:
        what = "a folder of something else"
    else:
        return
    raise UsageError(
        f"{what} stands where checkpoints are kept", where=str(root), hint="remove it yourself, or choose another --out"
    )


def open_root(root: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder ready for a run, removing checkpoints of a run with other settings.

    Raises:
        UsageError: Something else stands there (`require_ours`).
    """
    require_ours(root)
    mark = root / _IDENTITY
    if root.exists() and not (mark.is_file() and mark.read_text(encoding="utf-8") == canonical_json(identity)):
        shutil.rmtree(root)
    mark_root(root, identity)


def require_begun_alike(out: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to lose the checkpoints of a training that was begun with other settings.

    Args:
        out: What the training writes.
        identity: What it is now.

    Raises:
        UsageError: There are some; says what differs.
    """
    root = checkpoint_root(out)
    require_ours(root)
    if not root.exists() or (newest := latest_whole(root)) is None:
        return
    recorded = recorded_identity(root)
    differing = differences(recorded, identity) if recorded else ["it does not say what it was made from"]
    if differing:
        step = newest.name.rpartition("-")[2]
        raise UsageError(
            f"a training was begun there with other settings and kept at step {step}: {'; '.join(differing[:6])}",
            where=str(out),
            hint="the settings of before go on from it; choose another --out, or --overwrite to lose it",
        )


def said_kept(root: Path) -> str:
    """Say where what is done is kept, and how large that is; "" where nothing is."""
    if not root.is_dir() or latest_whole(root) is None:
        return ""
    size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    return f"what is done so far is kept in {root} ({in_units(size)}): the same command goes on from there"


def mark_root(root: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder, where it is not there, and have it say what it belongs to; what lies in it stays.

    Raises:
        UsageError: Something else stands there (`require_ours`).
    """
    require_ours(root)
    with writing_to(root):
        make_above(root)
        root.mkdir(exist_ok=True)
        partial = root / _PARTIAL
        partial.write_text(canonical_json(identity), encoding="utf-8")
        partial.replace(root / _IDENTITY)


def leave_no_empty(root: Path) -> None:
    """Remove a folder of checkpoints that holds none: its run was refused before the first."""
    if root.is_dir() and {p.name for p in root.iterdir()} <= {_IDENTITY}:
        shutil.rmtree(root)


def recorded_identity(root: Path) -> Mapping[str, Any]:
    """Read the identity of the run that a folder of checkpoints belongs to; empty where it is not readable."""
    try:
        identity = read_json(root / _IDENTITY)
    except PlaitError:
        return {}
    return identity if isinstance(identity, dict) else {}


def seal(stage: Path, final: Path) -> None:
    """Flush a staged checkpoint, record the hashes of its files, and rename it into place; older ones are let go."""
    files = sorted(p for p in stage.rglob("*") if p.is_file() and p.name != SEAL)
    listed = {str(p.relative_to(stage)): sha256_file(p) for p in files}
    (stage / SEAL).write_text(json.dumps(listed, indent=1), encoding="utf-8")
    for path in [*files, stage / SEAL]:
        with path.open("rb") as f:
            os.fsync(f.fileno())
    shutil.rmtree(final, ignore_errors=True)
    stage.rename(final)
    for old in _by_step(final.parent)[KEPT_CHECKPOINTS:]:
        shutil.rmtree(old, ignore_errors=True)


def latest_whole(root: Path) -> Path | None:
    """Find the newest checkpoint whose every file is as it was sealed, or None; damaged ones are passed over."""
    return next((c for c in _by_step(root) if is_whole(c)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is sealed and its files have the recorded hashes."""
    try:
        listed = read_json(checkpoint / SEAL)
        return all(sha256_file(checkpoint / name) == digest for name, digest in listed.items())
    except (PlaitError, OSError, AttributeError):
        return False


def _by_step(root: Path) -> list[Path]:
    steps = {p: p.name.rpartition("-")[2] for p in root.glob("checkpoint-*") if p.is_dir()}
    return sorted((p for p, step in steps.items() if step.isdigit()), key=lambda p: -int(steps[p]))
