"""Files that know what they hold: a digest of a file's tensors and texts among its texts.

A folder of plait's has a manifest that lists the hashes of its files. A single file (kohya's, diffusers', llama.cpp's, a Fisher
diagonal) has nothing beside it, so its digest lies in its own metadata, and is compared wherever plait reads the file. Files of
others hold none and are read as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plait.adapters.memory import bytes_of
from plait.adapters.tensor_file import write_tensors
from plait.errors import Damaged

if TYPE_CHECKING:
    from torch import Tensor

SEAL = "plait_sha256"
# A second name, which the digest covers: with one alone, a change in the name of the digest would leave a file without one.
SEALED = "plait_sealed"
_SAYS = "all tensors and all other metadata"


def sealed(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> dict[str, str]:
    """A file's texts with the digest of its tensors and of those texts.

    Args:
        tensors: Name -> tensor on the CPU.
        texts: All other metadata, exactly as a reader will find it.

    Cost: every byte is hashed once.
    """
    whole = {**texts, SEALED: _SAYS}
    return {**whole, SEAL: digest_of(tensors, whole)}


def digest_of(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, and of texts, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(texts):
        for text in (name, texts[name]):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(data)}\0".encode())
            digest.update(data)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        data = name.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)}\0".encode() + data)
        digest.update(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(bytes_of(tensor))
    return digest.hexdigest()


def is_sealed(texts: Mapping[str, str]) -> bool:
    """Whether a file says that it holds a digest of itself."""
    return SEAL in texts or SEALED in texts


def require_seal(tensors: Mapping[str, Tensor], texts: Mapping[str, str], where: str) -> None:
    """Refuse a file that is not the one that was written; one without a digest passes.

    Raises:
        Damaged: Its tensors or texts are others than those that its digest is of.

    Cost: every byte is hashed once, where there is a digest.
    """
    if not is_sealed(texts):
        return
    rest = {name: text for name, text in texts.items() if name != SEAL}
    if SEALED not in texts or texts.get(SEAL) != digest_of(tensors, rest):
        raise Damaged(
            "not the file that was written: the digest of its tensors and metadata is another",
            where=where,
            hint=f"copy it again; if it was edited on purpose, take {SEAL} and {SEALED} out of its metadata",
        )


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that holds a digest of itself; raises as `write_tensors`."""
    write_tensors(path, tensors, sealed(tensors, {"format": "pt", **metadata}))


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Read a safetensors file as `read_tensors` does, and hold it against its own digest where it has one.

    Raises:
        InputError: As `read_tensors`.
        Damaged: Not the file that was written.
    """
    from plait.adapters.tensors import read_tensors

    tensors, metadata, digest = read_tensors(path)
    require_seal(tensors, metadata, str(path))
    return tensors, metadata, digest
