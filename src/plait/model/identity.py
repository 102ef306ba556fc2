"""What a base is: hashes of everything that is loaded from it, by which statistics, adapters and results know it again."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from plait.disk.hub import snapshot_of
from plait.disk.store import sha256_file
from plait.model.base import BaseModel, base_folder
from plait.model.files import CONFIG, GENERATION, tokenizer_files, weight_files
from plait.model.records import EARLIER, SHA256

FILES, COMMIT = "files:", "commit:"  # the kinds of fingerprint; one without a kind is of weights and config alone


def base_fingerprint(base: BaseModel) -> str:
    """Hash all that is loaded from a base: "files:HASH" of a local folder, "commit:HASH" of a hub model.

    Of a folder: the weights (the shards that the index names), config.json, generation_config.json and the tokenizer's
    files, by name and content. What else lies there (pickles, cards, other formats) is never read and does not count.

    Raises:
        InputError: No such base, or no whole weights in safetensors.

    Cost: reads the files once per process (about a second per 2 GB).
    """
    folder = base_folder(base, weights=True)
    hub = None if Path(base.name).expanduser().is_dir() else snapshot_of(folder)
    if hub is not None:
        return COMMIT + hub.commit
    optional = [folder / GENERATION] if (folder / GENERATION).is_file() else []
    return FILES + _hashed([*weight_files(folder), folder / CONFIG, *optional, *tokenizer_files(folder)])


def held_fingerprint(base: BaseModel) -> str:
    """Hash a base as it is held: its files, and the four bits that its weights went through where they did."""
    return base_fingerprint(base) + (f"+{base.four_bits}" if base.four_bits else "")


def earlier_fingerprint(base: BaseModel) -> str | None:
    """Hash a local folder as an earlier plait did: every .safetensors file and config.json.

    Statistics and adapters that hold it can still be compared with a base at hand. None for hub models.
    """
    folder = Path(base.name).expanduser()
    if not folder.is_dir():
        return None
    return _hashed([p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == CONFIG])


def base_facts(base: BaseModel) -> dict[str, str]:
    """Say what records keep of a base, for `plait.model.records.same_weights`."""
    earlier = earlier_fingerprint(base)
    return {SHA256: base_fingerprint(base), **({EARLIER: earlier} if earlier else {})}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash what a tokenizer makes of text: its vocabulary, merges and special tokens."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.loads(fast.to_str()) if fast is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(vocabulary, dict):  # how the last call padded and cut is no property of the tokenizer
        vocabulary = {k: v for k, v in vocabulary.items() if k not in ("truncation", "padding")}
    text = json.dumps(vocabulary, sort_keys=True)
    return hashlib.sha256(f"{text}\0{sorted(tokenizer.special_tokens_map.items())}".encode()).hexdigest()


def _hashed(files: list[Path]) -> str:
    return _hash_files(tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(files)))


@functools.lru_cache(maxsize=16)
def _hash_files(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file[0]).name.encode() + b"\0" + _hash_file(file).encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)
def _hash_file(file: tuple[str, int, int]) -> str:
    return sha256_file(Path(file[0]))
