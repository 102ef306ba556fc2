"""The merging methods by name, with their options, for those who run none: without torch where that can be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from plait.border.plugins import MERGES
from plait.disk.method_lists import Listed, is_all, listed, read_list
from plait.errors import UsageError
from plait.options import did_you_mean

CALIBRATIONS = ("pico", "svc")


def merge_list() -> Mapping[str, Listed]:
    """List what `plait.merging.merge_methods` registers."""
    return read_list(Path(__file__).parent) if is_all("plait.merging.registry", MERGES) else registered()


def registered() -> Mapping[str, Listed]:
    """The same from the register."""
    from plait.merging.registry import merge_methods

    return MappingProxyType({name: listed(m, m.needs) for name, m in merge_methods().items()})


def require_method(name: str | None) -> None:
    """Refuse a name that no method has; None, which leaves the choice, passes.

    Raises:
        UsageError: Unknown; the nearest names are in the message.
    """
    if name is not None and name not in (methods := merge_list()):
        raise UsageError(f"unknown merging method {name!r}", hint=did_you_mean(name, methods))
