"""What records say of the base they belong to, and whether two of them speak of the same one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The fingerprint of everything that is loaded; and, of a local folder, the hash that an earlier plait recorded in its
# place (every *.safetensors and config.json), so that its statistics and adapters still compare with those of today.
SHA256, EARLIER = "base_sha256", "base_weights_sha256"


def fingerprints(record: Mapping[str, Any]) -> dict[str, str]:
    """Read a record's fingerprints by kind: "files", "commit", or "" for the kind of an earlier plait."""
    by_kind = {}
    for value in (record.get(EARLIER), record.get(SHA256)):
        if isinstance(value, str) and value:
            kind, colon, _ = value.partition(":")
            by_kind[kind if colon else ""] = value
    return by_kind


def same_weights(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool | None:
    """Whether two records speak of the same base; None where they have no kind of fingerprint in common.

    A folder and a commit cannot be compared. Where the newer kind is in both, it decides.
    """
    mine, theirs = fingerprints(a), fingerprints(b)
    common = sorted(mine.keys() & theirs.keys(), reverse=True)
    return mine[common[0]] == theirs[common[0]] if common else None


def other_weights(one: str, a: Mapping[str, Any], other: str, b: Mapping[str, Any]) -> str:
    """Say of two records of different weights whose each is: by the base's name and, where one name means both, its fingerprint.

    Args:
        one: What the first record is of, such as "task sst2".
        a: The first record.
        other: What the second is of.
        b: The second.

    >>> other_weights("task a", {"base": "old"}, "task b", {"base": "new"})
    "task a was taken with 'old', task b with 'new', which are other weights"
    """
    return f"{one} was taken with {_called(a, b)}, {other} with {_called(b, a)}, which are other weights"


def _called(record: Mapping[str, Any], beside: Mapping[str, Any]) -> str:
    name = record.get("base")
    if name and name != beside.get("base"):
        return repr(name)
    mine, theirs = fingerprints(record), fingerprints(beside)
    kind = max(mine.keys() & theirs.keys(), default="")
    fingerprint = " ".join(filter(None, (kind, mine.get(kind, "").rpartition(":")[2][:12])))
    return f"{repr(name) if name else 'a base'} ({fingerprint})"
