"""The methods that run the base, by name, with their options: without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from plait.disk.method_lists import Listed, listed, read_list


def forward_list() -> Mapping[str, Listed]:
    """List what `plait.fidelity.forward.METHODS` holds."""
    return read_list(Path(__file__).parent)


def registered() -> Mapping[str, Listed]:
    """The same from the methods themselves."""
    from plait.fidelity.forward import METHODS

    return MappingProxyType({name: listed(m, ("texts",)) for name, m in METHODS.items()})
