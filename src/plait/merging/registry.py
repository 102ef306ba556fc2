"""The register of merging methods: what each is called, what it needs, and which options it takes."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plait.border.plugins import MERGES as PLUGINS
from plait.border.plugins import load_plugins
from plait.errors import UsageError
from plait.merging.combinations import Combination as Combination
from plait.merging.dense import MergedDelta
from plait.merging.inputs import MergeInputs
from plait.options import Option, did_you_mean, options_of

Ahead = Callable[[MergeInputs, Mapping[str, Any]], object]


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A registered method.

    Args:
        name: What `--method` takes.
        function: MergeInputs of one module, and the options -> the merged delta.
        paper: Where it comes from, such as "arXiv:2306.01708"; "" for arithmetic nobody published first.
        needs: Statistics it cannot do without: "moments", "fisher", "output_gradients".
        options: Name -> Option(type, default, ...).
        doc: First line of its docstring.
        combination: Where the merged delta is sum_t c_t D_t: the weights -> c. Verification then needs no second run.
        ahead: (a module, the options) -> what the method will ask `MergeInputs.over_model` for: computed with all threads before
            the first module is merged.
        concatenates: Whether the result is that sum as `MergeInputs.combination` gives it: its rank is known before it is
            computed, and without a calibration it is taken straight from the factors as they were read (`Plan.summed`).
        stacks: Whether the function also takes several modules as one (`stacks.stack_of`) and gives a `FactorStack`: it is
            written for factors with any dimensions in front.
        ordered_by: The option that counts from the first adapter to the last, once it is given; "" where there is none. Only
            then is the order of the adapters more than a way to name them (`order_of`).
        cuts_by: The option that says to which rank the method itself cuts; "" where it does not. Where it is not given, the
            merge's rank takes its place.
    """

    name: str
    function: Callable[..., MergedDelta]
    paper: str
    needs: tuple[str, ...]
    options: Mapping[str, Option]
    doc: str
    combination: Combination | None = None
    ahead: Ahead | None = None
    concatenates: bool = False
    stacks: bool = False
    ordered_by: str = ""
    cuts_by: str = ""

    def order_of(self, names: Sequence[str], options: Mapping[str, Any]) -> list[int]:
        """Places of the adapters in the order in which they are merged: that of their names, whatever the order given.

        Rounding, and the place of each adapter's factors in the result, then depend on the set alone: the same adapters give
        the same bytes. The order given is kept where an option counts by it.
        """
        places = range(len(names))
        kept = self.ordered_by and options.get(self.ordered_by) is not None
        return list(places) if kept else sorted(places, key=lambda i: names[i])


_METHODS: dict[str, MergeMethod] = {}


def merge_method(
    name: str,
    *,
    paper: str = "",
    needs: Sequence[str] = (),
    combination: Combination | None = None,
    ahead: Ahead | None = None,
    concatenates: bool = False,
    stacks: bool = False,
    ordered_by: str = "",
    cuts_by: str = "",
) -> Callable[[Callable[..., MergedDelta]], Callable[..., MergedDelta]]:
    """Register a function as a merging method; its keyword-only parameters are the options.

    Args:
        name: Unique name.
        paper: arXiv number or "".
        needs: Any of "moments", "fisher", "output_gradients".
        combination: See `MergeMethod`.
        ahead: See `MergeMethod`.
        concatenates: See `MergeMethod`.
        stacks: See `MergeMethod`.
        ordered_by: See `MergeMethod`.
        cuts_by: See `MergeMethod`.
    """

    def register(function: Callable[..., MergedDelta]) -> Callable[..., MergedDelta]:
        if name in _METHODS:
            raise ValueError(f"merging method {name!r} is registered twice")
        doc = (inspect.getdoc(function) or "").partition("\n")[0]
        options = options_of(function)
        _METHODS[name] = MergeMethod(
            name,
            function,
            paper,
            tuple(needs),
            options,
            doc,
            combination,
            ahead,
            concatenates,
            stacks,
            ordered_by,
            cuts_by,
        )
        return function

    return register


@functools.cache
def _register_all() -> None:
    """Import plait's own methods, then those of other packages; once, and not before somebody asks."""
    home = importlib.import_module("plait.merging.methods")
    for file in pkgutil.iter_modules(home.__path__):
        importlib.import_module(f"{home.__name__}.{file.name}")
    load_plugins(PLUGINS)


def merge_methods() -> Mapping[str, MergeMethod]:
    """List every registered method by name, in alphabetical order: plait's own, and those of installed plug-ins.

    >>> merge_methods()["ties"].paper
    'arXiv:2306.01708'
    """
    _register_all()
    return types.MappingProxyType({k: _METHODS[k] for k in sorted(_METHODS)})


def find_method(name: str) -> MergeMethod:
    """Look a method up.

    Raises:
        UsageError: Unknown; the nearest names are in the message.
    """
    methods = merge_methods()
    if name not in methods:
        raise UsageError(f"unknown merging method {name!r}", hint=did_you_mean(name, methods))
    return methods[name]
