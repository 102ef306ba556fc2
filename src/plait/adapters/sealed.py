"""Files that know what they hold: a digest of a file's tensors and texts among its texts.

A folder of plait's has a manifest that lists the hashes of its files. A single file (kohya's, diffusers', llama.cpp's, a Fisher
diagonal) has nothing beside it, so its digest lies in its own metadata, and is compared wherever plait reads the file. Files of
others hold none and are read as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from plait.adapters.arrays import Array
from plait.adapters.file_bytes import read_layout
from plait.adapters.header import TORCH_NAMES
from plait.adapters.memory import bytes_of
from plait.adapters.tensor_file import Put, fill_tensors, write_tensors
from plait.border.checked import shown
from plait.errors import Damaged, InputError

if TYPE_CHECKING:
    from hashlib import _Hash as Digesting

    from torch import Tensor

    Tensors: TypeAlias = Mapping[str, Tensor] | Mapping[str, Tensor | Array]

SEAL = "plait_sha256"
# A second name, which the digest covers: with one alone, a change in the name of the digest would leave a file without one.
SEALED = "plait_sealed"
_PIECE = 1 << 20  # bytes of a file that are hashed at once
_SAYS = "all tensors and all other metadata"


def sealed(tensors: Tensors, texts: Mapping[str, str]) -> dict[str, str]:
    """A file's texts with the digest of its tensors and of those texts.

    Args:
        tensors: Name -> tensor on the CPU.
        texts: All other metadata, exactly as a reader will find it.

    Cost: every byte is hashed once.
    """
    whole = {**texts, SEALED: _SAYS}
    return {**whole, SEAL: digest_of(tensors, whole)}


def digest_of(tensors: Tensors, texts: Mapping[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, and of texts, in the order of their names."""
    digest = _begun(texts)
    for name in sorted(tensors):
        tensor = tensors[name]
        _add(digest, name, str(tensor.dtype), tuple(tensor.shape))
        if tensor.numel():
            digest.update(bytes_of(tensor if isinstance(tensor, Array) else tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def digest_of_file(path: Path, texts: Mapping[str, str]) -> str:
    """`digest_of` a file's tensors as they lie in it, and of texts; through a small buffer, whatever the types are.

    Raises:
        InputError: As `plait.adapters.file_bytes.read_layout`; or a type that is not read.
    """
    _, entries, begin = read_layout(path)
    digest, piece = _begun(texts), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as f:
        for name in sorted(entries):
            kind, (start, stop) = entries[name]["dtype"], entries[name]["data_offsets"]
            if kind not in TORCH_NAMES:
                raise InputError(f"tensor {name!r} is of type {shown(kind)}, which is not read", where=str(path))
            _add(digest, name, f"torch.{TORCH_NAMES[kind]}", tuple(entries[name]["shape"]))
            f.seek(begin + start)
            while start < stop:
                count = f.readinto(piece[: stop - start])
                if not count:
                    raise InputError("ends too early", where=str(path), hint="copy it again")
                digest.update(piece[:count])
                start += count
    return digest.hexdigest()


def _begun(texts: Mapping[str, str]) -> Digesting:
    digest = hashlib.sha256()
    for name in sorted(texts):
        for text in (name, texts[name]):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(data)}\0".encode())
            digest.update(data)
    return digest


def _add(digest: Digesting, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    data = name.encode("utf-8", "surrogatepass")
    digest.update(f"{len(data)}\0".encode() + data)
    digest.update(f"{dtype}\0{shape}\0".encode())


def is_sealed(texts: Mapping[str, str]) -> bool:
    """Whether a file says that it holds a digest of itself."""
    return SEAL in texts or SEALED in texts


def require_seal(tensors: Tensors, texts: Mapping[str, str], where: str) -> None:
    """Refuse a file that is not the one that was written; one without a digest passes.

    Raises:
        Damaged: Its tensors or texts are others than those that its digest is of.

    Cost: every byte is hashed once, where there is a digest.
    """
    if is_sealed(texts):
        _require_digest(texts, digest_of(tensors, _unsealed(texts)), where)


def _unsealed(texts: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in texts.items() if name != SEAL}


def _require_digest(texts: Mapping[str, str], digest: str, where: str) -> None:
    if SEALED not in texts or texts.get(SEAL) != digest:
        raise Damaged(
            "not the file that was written: the digest of its tensors and metadata is another",
            where=where,
            hint=f"copy it again; if it was edited on purpose, take {SEAL} and {SEALED} out of its metadata",
        )


def sealed_texts(path: Path) -> dict[str, str]:
    """A safetensors file's texts, the file held against its digest where it has one; no tensor is made of it.

    Raises:
        InputError: As `plait.adapters.file_bytes.read_layout`.
        Damaged: Not the file that was written.
    """
    texts = read_layout(path)[0]
    if is_sealed(texts):
        _require_digest(texts, digest_of_file(path, _unsealed(texts)), str(path))
    return texts


def fill_sealed(
    path: Path,
    shapes: Tensors,
    fill: Callable[[Put], None],
    longest: Mapping[str, str],
    texts: Callable[[], Mapping[str, str]],
    check: Callable[[], None] | None = None,
) -> None:
    """Write a sealed file whose tensors come one by one and whose texts are known when all have come.

    The digest is of what lies in the file then, read from it by a thread of its own while `check` looks at it.

    Args:
        path: The file to write.
        shapes: See `plait.adapters.tensor_file.fill_tensors`.
        fill: See there.
        longest: Texts that are as long as those to come, or a little longer.
        texts: Gives them, once.
        check: Looks at the tensors in the file; what it raises comes out of here.

    Raises:
        OSError: The disk is full, or whatever else the system says.
    """

    def seal() -> Mapping[str, str]:
        whole = {"format": "pt", **texts(), SEALED: _SAYS}
        with ThreadPoolExecutor(1) as thread:
            digest = thread.submit(digest_of_file, path, whole)
            if check:
                check()
            return {**whole, SEAL: digest.result()}

    fill_tensors(path, shapes, {**longest, SEALED: _SAYS, SEAL: "0" * 64}, fill, late=seal)


def write_sealed(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
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
