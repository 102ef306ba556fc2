"""Names of a package that are imported from its files when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

TYPE_CHECKING = False  # typing itself takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Make a package's ``__getattr__``, which imports a name's file when the name is first asked for.

    The package repeats the names below ``if TYPE_CHECKING``, where editors and type checkers look for them.

    >>> get = lazily("plait", {"PlaitError": "errors"})
    >>> get("PlaitError").__module__
    'plait.errors'
    >>> get("PlatError")
    Traceback (most recent call last):
    AttributeError: module 'plait' has no attribute 'PlatError'

    Args:
        package: ``__name__`` of the package.
        homes: Name -> the package's file that has it, without the package.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return get
