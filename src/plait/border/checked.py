"""Records that somebody else wrote (JSON, YAML, metadata), read by key: every value of its type and in its range, or an error."""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plait.border.counts import plural
from plait.errors import InputError, PlaitError

Json = dict[str, Any]  # a JSON object: what stands in a file, or is hashed as an identity
LARGEST_NUMBER = sys.float_info.max
LARGEST_INTEGER = (1 << 53) - 1  # the largest that every JSON reader keeps; nothing counted here comes near it
LONGEST_TEXT = 4096  # as long as a path may be
MOST_ENTRIES = 1_000_000
LARGEST_MANIFEST = 8 << 20  # a merge of 18,000 modules records 2 MB
_REQUIRED: Any = object()
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


@dataclass(frozen=True, slots=True)
class Record:
    """A mapping from a file that somebody else wrote.

    >>> record = Record.of({"rank": 8, "shape": [3, 4]}, "adapter_config.json")
    >>> record.integer("rank"), record.integers("shape", length=2)
    (8, (3, 4))

    Args:
        values: The mapping, as a parser gave it.
        where: The file, for messages.
        inside: Where in the file it stands, such as "modules[layer.0.query]"; "" for the whole.
        kind: What a wrong value raises: `InputError`, or `UsageError` for what a user typed.
        hint: The next step of every message.
    """

    values: Mapping[str, Any]
    where: str
    inside: str = ""
    kind: type[PlaitError] = InputError
    hint: str | None = None

    @classmethod
    def of(
        cls, value: Any, where: str, *, inside: str = "", kind: type[PlaitError] = InputError, hint: str | None = None
    ) -> Record:
        """Take a parsed value as a record.

        Raises:
            PlaitError: Whatever `kind` is: it is no mapping, or has keys that are no text, or too many.
        """
        if not isinstance(value, dict):
            lead = f"{inside} is {shown(value)}, expected an object" if inside else "not a JSON object"
            raise kind(lead, where=where, hint=hint)
        if odd := [k for k in value if not isinstance(k, str)]:
            place = f"a key of {inside}" if inside else "a key"
            raise kind(f"{place} is {shown(odd[0])}, expected text", where=where, hint=hint)
        if len(value) > MOST_ENTRIES:
            raise kind(f"{len(value)} keys, at most {MOST_ENTRIES} are read", where=where, hint=hint)
        return cls(value, where, inside, kind, hint)

    def has(self, key: str) -> bool:
        """Whether a key is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, low: int = 0, high: int = LARGEST_INTEGER, default: int = _REQUIRED) -> int:
        """Read a whole number from `low` to `high`; `default` where the key is absent. Neither true nor 2.0 is one."""
        value = self._found(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, value, f"an integer from {low} to {high}")
        return value

    def number(
        self,
        key: str,
        low: float = -LARGEST_NUMBER,
        high: float = LARGEST_NUMBER,
        default: float = _REQUIRED,
        *,
        above: bool = False,
    ) -> float:
        """Read a finite number from `low` (excluded where `above`) to `high`; `default` where the key is absent."""
        value = self._found(key, default)
        inside = not isinstance(value, bool) and isinstance(value, int | float) and low <= value <= high
        if not inside or (above and value == low):
            raise self.wrong(key, value, _range(low, high, above))
        return float(value)

    def flag(self, key: str, default: bool = _REQUIRED) -> bool:
        """True or false; `default` where the key is absent or null. The text "false" is neither."""
        value = self._found(key, default)
        value = default if value is None and default is not _REQUIRED else value
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(
        self, key: str, default: str = _REQUIRED, *, choices: Sequence[str] = (), longest: int = LONGEST_TEXT
    ) -> str:
        """Read a text, one of `choices` where there are any; `default` where the key is absent."""
        value = self._found(key, default)
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.wrong(key, value, f"one of {', '.join(choices)}" if choices else "a text")
        if len(value) > longest or not encodable(value):
            raise self.wrong(key, value, f"at most {longest} characters of text")
        return value

    def texts(self, key: str, default: Sequence[str] = _REQUIRED, *, most: int = MOST_ENTRIES) -> tuple[str, ...]:
        """Read a list of texts; `default` where the key is absent or null."""
        value = self._found(key, default)
        value = list(default) if value is None and default is not _REQUIRED else value
        if isinstance(value, tuple) or value is default:
            return tuple(value)
        if not isinstance(value, list) or not all(isinstance(v, str) and encodable(v) for v in value):
            raise self.wrong(key, value, "a list of texts")
        if len(value) > most or any(len(v) > LONGEST_TEXT for v in value):
            raise self.wrong(key, value, f"at most {most} texts of {LONGEST_TEXT} characters")
        return tuple(value)

    def integers(self, key: str, *, length: int, low: int = 0, high: int = LARGEST_INTEGER) -> tuple[int, ...]:
        """Read a list of so many whole numbers from `low` to `high`, such as a shape."""
        value = self._found(key, _REQUIRED)
        whole = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if not whole or len(value) != length or not all(low <= v <= high for v in value):
            raise self.wrong(key, value, f"a list of {plural(length, 'integer')} from {low} to {high}")
        return tuple(value)

    def record(self, key: str, *, optional: bool = False) -> Record:
        """Read the mapping under a key; an empty one where `optional` and absent or null."""
        value = self._found(key, None if optional else _REQUIRED)
        if value is _REQUIRED:
            raise self.wrong(key, value, "an object")
        inside = self._place(key)
        empty = optional and value is None
        return Record.of({} if empty else value, self.where, inside=inside, kind=self.kind, hint=self.hint)

    def records(self) -> Iterator[tuple[str, Record]]:
        """Read every entry of a mapping of mappings."""
        for key, value in self.values.items():
            inside = f"{self.inside}[{key}]" if self.inside else key
            yield key, Record.of(value, self.where, inside=inside, kind=self.kind, hint=self.hint)

    def only(self, known: Sequence[str]) -> None:
        """Refuse keys that are not among the known."""
        if odd := sorted(set(self.values) - set(known)):
            raise self.kind(
                f"unknown key {shown(self._place(odd[0]))}", where=self.where, hint=f"known: {', '.join(known)}"
            )

    def wrong(self, key: str, value: object, expected: str) -> PlaitError:
        """Make the error that says what stands under a key and what should."""
        found = "absent" if value is _REQUIRED else shown(value)
        return self.kind(f"{self._place(key)} is {found}, expected {expected}", where=self.where, hint=self.hint)

    def _found(self, key: str, default: Any) -> Any:
        return self.values.get(key, default)

    def _place(self, key: str) -> str:
        if not self.inside:
            return key
        return f"{self.inside}[{key}]" if self.inside.endswith("_pattern") else f"{self.inside}.{key}"


def shown(value: object) -> str:
    """Show a foreign value in a message: short, whatever it is."""
    try:
        return _repr.repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes out; a list inside itself
        return f"too large a {type(value).__name__} to show"


def encodable(text: str) -> bool:
    """Whether a text can be written: JSON may hold halves of surrogate pairs, no file name and no other file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parsed_json(text: str, where: str, what: str, limit: int, hint: str | None = None) -> Any:
    """JSON from a file's metadata, of bounded length and without a key twice.

    Raises:
        InputError: It is none, or longer than `limit` characters.
    """
    if len(text) > limit:
        raise InputError(f"{what} has {len(text)} characters, at most {limit} are read", where=where, hint=hint)
    try:
        return json.loads(text, object_pairs_hook=distinct_keys)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{what} is not JSON: {e}", where=where, hint=hint) from None


class DuplicateKey(ValueError):  # noqa: N818 (what is wrong with the text)
    """A JSON object has a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"duplicate key {shown(key)}")
        self.key = key


def distinct_keys(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    """Make a mapping of the pairs of a JSON object.

    >>> distinct_keys([("a", 1), ("b", 2)])
    {'a': 1, 'b': 2}

    Raises:
        DuplicateKey: The last would silently win.

    Cost: linear in the number of pairs.
    """
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise DuplicateKey(twice)
    return mapping


def _range(low: float, high: float, above: bool) -> str:
    below = "" if high == LARGEST_NUMBER else f" {'and' if low != -LARGEST_NUMBER else ''} at most {high:g}".rstrip()
    if low == -LARGEST_NUMBER:
        return f"a finite number{below}"
    return f"a finite number {f'above {low:g}' if above else f'of at least {low:g}'}{below}"
