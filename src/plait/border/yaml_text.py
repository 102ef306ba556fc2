"""YAML that somebody else wrote: parsed without building objects, no key twice, and no aliases where they have no use."""

from __future__ import annotations

import re
from typing import Any

import yaml

from plait.errors import InputError, UsageError

# What PyYAML raises: its own, and what its constructors of dates, numbers and truth values let through.
YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError, OverflowError)


class _DistinctKeys(yaml.SafeLoader):
    """Safe YAML without duplicate keys (the last would silently win)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Build a mapping in which no key stands twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.YAMLError(f"key {key.value!r} stands twice, line {key.start_mark.line + 1}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _WithoutAliases(_DistinctKeys):
    """The same without aliases: a bomb needs them."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse an alias, else compose the node."""
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported")
        return super().compose_node(parent, index)


# YAML 1.1 reads 1e-3 as a string; people who write numbers mean numbers.
_WithoutAliases.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(text: str, where: str) -> Any:
    """Parse a recipe's YAML safely: no tags that build objects, no aliases, no duplicate keys.

    Args:
        text: The YAML.
        where: Its file or option, for the message.

    Raises:
        UsageError: With the line, where YAML gives one.
    """
    try:
        return yaml.load(text, Loader=_WithoutAliases)  # noqa: S506 (a SafeLoader)
    except YAML_ERRORS as e:
        raise UsageError("not a recipe: " + " ".join(str(e).split()), where=where, hint="correct the file") from None


def load_foreign_yaml(text: str, where: str) -> Any:
    """Parse another tool's YAML safely: aliases are allowed, and numbers are read as every YAML 1.1 reader does.

    Args:
        text: The YAML.
        where: Its file, for the message.

    Raises:
        InputError: With the line, where YAML gives one.
    """
    try:
        return yaml.load(text, Loader=_DistinctKeys)  # noqa: S506 (a SafeLoader)
    except YAML_ERRORS as e:
        raise InputError("not YAML: " + " ".join(str(e).split()), where=where, hint="correct the file") from None
