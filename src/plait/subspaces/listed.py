"""The subspace methods by name, with their options, for those who run none: without torch where that can be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from plait.border.plugins import SUBSPACES
from plait.disk.method_lists import Listed, is_all, listed, read_list


def subspace_list() -> Mapping[str, Listed]:
    """List what `plait.subspaces.subspace_methods` registers."""
    return read_list(Path(__file__).parent) if is_all("plait.subspaces.registry", SUBSPACES) else registered()


def registered() -> Mapping[str, Listed]:
    """The same from the register."""
    from plait.subspaces.registry import subspace_methods

    return MappingProxyType({name: listed(m, m.needs) for name, m in subspace_methods().items()})
