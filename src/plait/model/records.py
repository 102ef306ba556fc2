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
