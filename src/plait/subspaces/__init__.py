"""Subspaces a LoRA may start in: computed from statistics, one registered method per idea."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.border.lazy import lazily

if TYPE_CHECKING:
    from plait.subspaces.compute import Subspace as Subspace
    from plait.subspaces.compute import completed as completed
    from plait.subspaces.compute import compute_subspaces as compute_subspaces
    from plait.subspaces.registry import find_subspace_method as find_subspace_method
    from plait.subspaces.registry import subspace_method as subspace_method
    from plait.subspaces.registry import subspace_methods as subspace_methods
    from plait.subspaces.stream import StreamedSubspaces as StreamedSubspaces
    from plait.subspaces.stream import stream_subspaces as stream_subspaces

_HOMES = {
    "StreamedSubspaces": "stream",
    "Subspace": "compute",
    "completed": "compute",
    "compute_subspaces": "compute",
    "find_subspace_method": "registry",
    "stream_subspaces": "stream",
    "subspace_method": "registry",
    "subspace_methods": "registry",
}
__all__ = [*_HOMES]  # noqa: PLE0604  (strings, all of them)

__getattr__ = lazily(__name__, _HOMES)
