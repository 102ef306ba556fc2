"""Files read strictly: bounded JSON from anywhere, the bytes of a file as one hash, and one text and hash per JSON value."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

from plait.border.checked import distinct_keys
from plait.disk.locks import require_readable
from plait.errors import InputError

HASHED_BYTES_AT_ONCE = 1 << 22  # threads that read and hash wait for Python's lock once a piece
_JSON_LIMIT = 64 << 20
_TEXT_LIMIT = 1 << 20


def sha256_file(path: Path) -> str:
    """Hash a file's bytes.

    Raises:
        InputError: No regular file is there, or one that may not be read.
    """
    require_regular(path)
    digest, piece = hashlib.sha256(), memoryview(bytearray(HASHED_BYTES_AT_ONCE))
    with path.open("rb", buffering=0) as f:
        while count := f.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hash a JSON value independently of key order.

    >>> sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """Write one JSON text per value: sorted keys, no spaces, NaN refused.

    >>> canonical_json({"b": 1, "a": [1.5, None]})
    '{"a":[1.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def read_json(path: Path, limit: int = _JSON_LIMIT) -> Any:
    """Read a JSON file strictly: a regular file, UTF-8 (a BOM is tolerated), bounded size and depth, no duplicate keys."""
    require_regular(path)
    size = path.stat().st_size
    if size > limit:
        raise InputError(f"JSON of {size} bytes, at most {limit} expected", where=str(path))
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=distinct_keys)
    except UnicodeDecodeError as e:
        raise InputError(f"not UTF-8 at byte {e.start}", where=str(path), hint="save it as UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"not valid JSON: {e}", where=str(path)) from None


def text_of(path: Path) -> str:
    """Read a text file of at most 1 MiB: a recipe, a study, weights, a card.

    Raises:
        InputError: Not a file that may be read, over 1 MiB, or not UTF-8.
    """
    require_regular(path)
    if path.stat().st_size > _TEXT_LIMIT:
        raise InputError("over 1 MiB, more than such a text has", where=str(path))
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"not UTF-8 at byte {e.start}", where=str(path), hint="save it as UTF-8") from None


def nearby(path: Path) -> str:
    """Say what to do about a path where nothing is: the entry beside it whose name is nearest, if one is near."""
    if path.is_symlink():
        return "it is a link, and nothing is where it leads"
    try:
        beside = [entry.name for entry in path.absolute().parent.iterdir()]
    except OSError:  # no folder there either, or one that may not be read
        return "check the path"
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"did you mean {str(path.parent / near[0])!r}?" if near else "check the path"


def require_regular(path: Path) -> None:
    """Refuse what is not a regular file (a FIFO would block, a device never ends) or may not be read."""
    require_readable(path)
    if not path.exists():
        raise InputError("no such file", where=str(path), hint=nearby(path))
    if not path.is_file():
        raise InputError("not a regular file", where=str(path))
