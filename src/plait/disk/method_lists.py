"""The methods that a room registers, as it lists them in a file: who asks for names and options alone does without torch.

Every method is registered where its function is written, which takes torch to import. What `plait ls`, `plait validate` and a
mistyped name need to know of them lies beside them in `methods.json`, which `make lists` writes and a test compares.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from plait.options import Option, Range

FILE = "methods.json"
_TYPES = {"int": int, "float": float, "bool": bool, "str": str}


@dataclass(frozen=True, slots=True)
class Listed:
    """What is to be known of a method that is not run.

    Args:
        name: What `--method` takes.
        about: First paragraph of its docstring.
        paper: Where it comes from; "" for none.
        needs: Statistics, or texts, that it cannot do without.
        options: Name -> option.
    """

    name: str
    about: str
    paper: str
    needs: tuple[str, ...]
    options: Mapping[str, Option]


class Registered(Protocol):
    """A method as its register has it."""

    @property
    def name(self) -> str:
        """Unique name."""

    @property
    def function(self) -> Callable[..., Any]:
        """What is run."""

    @property
    def paper(self) -> str:
        """Where it comes from."""

    @property
    def options(self) -> Mapping[str, Option]:
        """Name -> option."""


def listed(method: Registered, needs: tuple[str, ...]) -> Listed:
    """List a registered method.

    Args:
        method: As its register has it.
        needs: What it cannot do without.
    """
    about = " ".join((method.function.__doc__ or "").strip().split("\n\n")[0].split())
    return Listed(method.name, about, method.paper, needs, method.options)


def is_all(register: str, group: str) -> bool:
    """Whether a room's list holds all its methods: its register was not imported, and no other package adds to it.

    Args:
        register: Dotted name of the register, in which a process may have registered methods of its own.
        group: Entry points by which packages do.
    """
    return register not in sys.modules and not _is_added_to(group)


@functools.cache  # a recipe's check asks for every arm and merge, and each answer reads the record of every installed package
def _is_added_to(group: str) -> bool:
    """Whether an installed package has entry points of a group."""
    return bool(entry_points(group=group))


def read_list(folder: Path) -> Mapping[str, Listed]:
    """The methods listed in a room's folder, by name, in the order of the register."""
    raw = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return MappingProxyType({name: _read(name, entry) for name, entry in raw.items()})


def list_text(methods: Mapping[str, Listed]) -> str:
    """What `read_list` reads."""
    raw = {
        name: {
            "about": m.about,
            "paper": m.paper,
            "needs": list(m.needs),
            "options": {key: _written(option) for key, option in m.options.items()},
        }
        for name, m in methods.items()
    }
    return json.dumps(raw, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def _written(option: Option) -> dict[str, Any]:
    allowed: Any = option.allowed
    if isinstance(allowed, Range):
        low, high = (v if math.isfinite(v) else None for v in (allowed.low, allowed.high))
        allowed = {"low": low, "high": high, "open_low": allowed.open_low}
    kind = option.type.__name__
    return {"type": kind, "default": option.default, "allowed": allowed, "optional": option.optional}


def _read(name: str, entry: Mapping[str, Any]) -> Listed:
    options = {key: _option(raw) for key, raw in entry["options"].items()}
    return Listed(name, entry["about"], entry["paper"], tuple(entry["needs"]), options)


def _option(raw: Mapping[str, Any]) -> Option:
    allowed: Any = raw["allowed"]
    if isinstance(allowed, dict):
        low, high = allowed["low"], allowed["high"]
        allowed = Range(-math.inf if low is None else low, math.inf if high is None else high, allowed["open_low"])
    elif allowed is not None:
        allowed = tuple(allowed)
    return Option(_TYPES[raw["type"]], raw["default"], allowed, raw["optional"])
