"""Options of registered methods: a function's keyword-only parameters are the schema, checked in one place."""

from __future__ import annotations

import difflib
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Union, get_args, get_origin, get_type_hints

from plait.border.checked import LARGEST_NUMBER, shown
from plait.errors import UsageError, printable


class Range(NamedTuple):
    """Bounds of a numeric option; `open_low` leaves `low` itself out."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value lies inside."""
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


Density = Annotated[float, Range(0.0, 1.0, open_low=True)]
Fraction = Annotated[float, Range(0.0, 1.0)]
Positive = Annotated[float, Range(0.0, math.inf, open_low=True)]
Space = Literal["dense", "core", "knots"]
Agreeing = Literal["mean", "sum"]


class Configurable(Protocol):
    """Anything registered under a name with options: a merging method, a subspace method."""

    @property
    def name(self) -> str:
        """Unique name."""

    @property
    def options(self) -> Mapping[str, Option]:
        """Name -> option."""


class Option(NamedTuple):
    """One option of a method: its type (int, float, bool or str), its default, and what it may be."""

    type: type
    default: Any
    allowed: Range | tuple[str, ...] | None = None
    optional: bool = False

    def describe(self) -> str:
        """The type and what is allowed, for a table or a message."""
        shown = (
            " | ".join(self.allowed) if isinstance(self.allowed, tuple) and not isinstance(self.allowed, Range) else ""
        )
        bounds = f" in {self.allowed}" if isinstance(self.allowed, Range) else ""
        return (shown or self.type.__name__ + bounds) + (" or none" if self.optional else "")


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """A hint with the nearest known word, or all of them; what stands in a recipe may be no word."""
    names = sorted(known)
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(names) or 'none'}"


def require_known(name: object, known: Iterable[str], what: str, where: str | None = None) -> None:
    """Refuse a name that is not among the known ones; the message has the nearest.

    Args:
        name: What was given.
        known: What there is.
        what: The kind of thing, such as "task".
        where: The key or file that gave it.

    Raises:
        UsageError: Unknown.
    """
    if name not in (names := list(known)):
        raise UsageError(f"unknown {what} {printable(name, 60)!r}", where=where, hint=did_you_mean(name, names))


def checked_options(method: Configurable, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """All options of a method: those given, checked, and the defaults of the others.

    Raises:
        UsageError: Unknown, of a wrong type, or out of range.
    """
    given = dict(options or {})
    for key in given:
        if key not in method.options:
            raise UsageError(f"{method.name} has no option {key!r}", hint=did_you_mean(key, method.options))
    return {k: _checked(method.name, k, given[k], o) if k in given else o.default for k, o in method.options.items()}


def _checked(method: str, key: str, value: Any, option: Option) -> Any:
    wrong = UsageError(f"{method}: {key} is {shown(value)}, expected {option.describe()}")
    if value is None and option.optional:
        return None
    if isinstance(value, int | float) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
        raise wrong
    if option.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, option.type) or (isinstance(value, bool) and option.type is not bool):
        raise wrong
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong
    if isinstance(option.allowed, Range):
        if not isinstance(value, int | float) or not option.allowed.holds(value):
            raise wrong
    elif option.allowed is not None and value not in option.allowed:
        raise wrong
    return value


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """Name -> Option of every keyword-only parameter of a function."""
    hints = get_type_hints(function, include_extras=True)
    keyword_only = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: _option(p, hints[p.name]) for p in keyword_only}


def _option(parameter: inspect.Parameter, hint: Any) -> Option:
    if parameter.default is parameter.empty:
        raise TypeError(f"option {parameter.name!r} has no default; every method runs without options")
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional:
        hint = next(h for h in get_args(hint) if h is not type(None))
    if get_origin(hint) is Literal:
        return Option(str, parameter.default, tuple(get_args(hint)), optional)
    if get_origin(hint) is Annotated:
        kind, allowed = get_args(hint)
        return Option(kind, parameter.default, allowed, optional)
    return Option(hint, parameter.default, None, optional)
