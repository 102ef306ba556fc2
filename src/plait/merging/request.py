"""What somebody asks of a merge on the command line: one value, whoever answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plait.adapters.arrays import KEEP
from plait.merging.spec import MergeSpec


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """A merge, and what else may be wanted of it.

    Args:
        folders: ``PATH`` or ``NAME=PATH`` each, or one mergekit YAML file, whose settings then hold.
        out: Where the result goes; None for a rank curve, which writes nothing.
        spec: How to merge.
        statistics: Task -> its statistics file.
        format: Format of the result; by default the inputs'.
        dtype: Type of its factors; see `merge_folders`.
        verify: Whether the result is read again and compared with the inputs.
        overwrite: Whether what stands at `out` is replaced.
        bake_into: Folder of the base, or its name on the hub: write a full model instead of an adapter.
        per_task: Whether EMR's unified adapter is written, with a mask per task.
        curve: Whether nothing is written, and what ranks r, 2r, 4r and R would lose is said.
        stack: Whether the adapters were trained one on top of another: they are composed in that order.
    """

    folders: Sequence[str]
    out: Path | None = None
    spec: MergeSpec = field(default_factory=MergeSpec)
    statistics: Mapping[str, Path | str] | None = None
    format: str | None = None
    dtype: str = KEEP
    verify: bool = True
    overwrite: bool = False
    bake_into: Path | None = None
    per_task: bool = False
    curve: bool = False
    stack: bool = False
