"""The register of subspace methods: what each is called, what it needs, and which options it takes."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plait.border.plugins import SUBSPACES as PLUGINS
from plait.border.plugins import load_plugins
from plait.errors import UsageError
from plait.options import Option, did_you_mean, options_of
from plait.subspaces.inputs import Basis

# The length of a row of A where the caller names none: 1, a standard Gaussian's, or as it was drawn.
RowNorm = Literal["unit", "gaussian", "drawn"]
Function = Callable[..., Mapping[str, Basis]]


@dataclass(frozen=True, slots=True)
class SubspaceMethod:
    """A registered method.

    Args:
        name: What `--method` takes.
        function: One site of all tasks, and the options -> a basis for each wanted task.
        paper: Where it comes from; "" for ours.
        needs: What it reads: "moments", "means" (padded), "own", "others", "weights" (the base's); empty for one drawn without data.
        row_norm: Default length of A's rows.
        options: Name -> Option(type, default, ...).
        doc: First line of its docstring.
    """

    name: str
    function: Function
    paper: str
    needs: tuple[str, ...]
    row_norm: RowNorm
    options: Mapping[str, Option]
    doc: str

    @property
    def per_module(self) -> bool:
        """Whether modules that read one site get bases of their own."""
        return not self.needs or "weights" in self.needs


_METHODS: dict[str, SubspaceMethod] = {}


def subspace_method(
    name: str, *, paper: str = "", needs: Sequence[str] = (), row_norm: RowNorm = "unit"
) -> Callable[[Function], Function]:
    """Register a function as a subspace method; its keyword-only parameters are the options.

    Args:
        name: Unique name.
        paper: arXiv number or "".
        needs: Any of "moments", "means", "own", "others", "weights"; without any, or with weights, the method is run per module, not
            per site.
        row_norm: "unit", "gaussian" (sqrt(d)/r) or "drawn".
    """

    def register(function: Function) -> Function:
        if name in _METHODS:
            raise ValueError(f"subspace method {name!r} is registered twice")
        doc = (inspect.getdoc(function) or "").partition("\n")[0]
        _METHODS[name] = SubspaceMethod(name, function, paper, tuple(needs), row_norm, options_of(function), doc)
        return function

    return register


@functools.cache
def _register_all() -> None:
    """Import plait's own methods, then those of other packages; once, and not before somebody asks."""
    for file in ("contrastive", "controls", "corda", "inflora", "osrm"):
        importlib.import_module(f"plait.subspaces.{file}")
    load_plugins(PLUGINS)


def subspace_methods() -> Mapping[str, SubspaceMethod]:
    """List every registered method by name, in alphabetical order: plait's own, and those of installed plug-ins.

    >>> subspace_methods()["kaiming"].needs
    ()
    """
    _register_all()
    return types.MappingProxyType({k: _METHODS[k] for k in sorted(_METHODS)})


def find_subspace_method(name: str) -> SubspaceMethod:
    """Look a method up.

    >>> find_subspace_method("osrm").paper
    'arXiv:2505.22934'

    Raises:
        UsageError: Unknown; the nearest names are in the message.
    """
    known = subspace_methods()
    if name not in known:
        raise UsageError(f"unknown subspace method {name!r}", hint=did_you_mean(name, known))
    return known[name]


def default_row_norm(method: SubspaceMethod, dim: int, rank: int) -> float | None:
    """Length of A's rows where none is asked for; None leaves them as drawn.

    "gaussian" is the length of PEFT's Gaussian rows, sqrt(d)/r: the baseline that OSRM's authors compare with, and the
    norm at which `contrastive` did best beforehand (3.5 at d 768, r 8). Learning rate and row norm act together, so arms
    are compared at one norm.
    """
    if method.row_norm == "gaussian":
        return math.sqrt(dim) / rank
    return 1.0 if method.row_norm == "unit" else None


def checked_row_norm(value: Any) -> float | None:
    """Check a row norm, or None.

    >>> checked_row_norm(2), checked_row_norm(None)
    (2.0, None)

    Raises:
        UsageError: Not a finite number above 0.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UsageError(f"row norm {value!r}, expected a finite number above 0")
    return float(value)
