"""A result that stands on disk: its record, where it is, and whether it stood there before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from plait.border.records import from_json, inline, optional
from plait.disk import store

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Written(Generic[R]):
    """What a command wrote.

    Args:
        record: What was done, as the manifest keeps it.
        output: Folder or file of the result.
        reused: Whether it stood there already, from the same inputs and settings.
        seconds_merge: Time of a merge, from the first file opened to the last one closed.
        seconds_verify: The part of it that went into reading the result again.
    """

    record: R = inline()
    output: str = ""
    reused: bool = False
    seconds_merge: float | None = optional()
    seconds_verify: float | None = optional()


def reused(out: Path, manifest: Mapping[str, Any], kind: type[R]) -> Written[R]:
    """Give a result that stood at `out` before.

    Args:
        out: Where.
        manifest: Its manifest.
        kind: Class of its record.
    """
    return Written(from_json(kind, manifest.get("result", {}), str(out)), str(out), reused=True)


def standing(out: Path, wanted: Mapping[str, Any], kind: type[R], *, overwrite: bool) -> Written[R] | None:
    """Give the result that stands in a folder where it is the wanted one and complete; else None.

    Args:
        out: The folder.
        wanted: Identity of the result.
        kind: Class of its record.
        overwrite: Whether what stands there is to be replaced.

    Raises:
        UsageError: Something else stands there.
    """
    if not store.is_done(out, wanted, overwrite=overwrite):
        return None
    return reused(out, store.read_manifest(out) or {}, kind)
