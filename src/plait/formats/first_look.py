"""How much of an adapter is read to say what it is: all of a small one, the headers alone of a large PEFT folder."""

from __future__ import annotations

from pathlib import Path

from plait.adapters.arrays import Array, NoArrayError
from plait.adapters.config import CONFIG
from plait.adapters.file_bytes import begin_arrays
from plait.adapters.hashing import Hashing
from plait.adapters.lora import Adapter
from plait.adapters.memory import let_go
from plait.adapters.peft_format import begin_adapter, read_adapter
from plait.adapters.shapes import Shape, begin_shapes
from plait.disk.files import sha256_file
from plait.disk.manifest import require_whole
from plait.errors import Damaged, PlaitError
from plait.formats.recognised import is_mlx

# Bytes up to which an adapter's numbers are read for its first look, which stays below a second.
READ_WHOLE = 1 << 26


def attempt(path: Path, nbytes: int, *, full: bool) -> tuple[Adapter | None, str | None]:
    """Read an adapter as far as a first look needs it.

    Args:
        path: A folder of PEFT or mlx-lm, or a LoRA file.
        nbytes: Bytes of its tensors.
        full: Whether to read the numbers of a large folder too.

    Returns:
        The adapter, or why it cannot be read as a plain LoRA; of a large folder the factors are shapes unless `full`.

    Raises:
        Damaged: Not what its manifest says.
    """
    try:
        if path.is_dir() and not is_mlx(path):
            return (_read(path) if nbytes <= READ_WHOLE else _mapped(path) if full else _from_headers(path)), None
        from plait.formats.reading import read_any

        return read_any(path), None
    except Damaged:  # of nothing in it can be said that it is what was written
        raise
    except PlaitError as e:
        return None, f"{e.what}" + (f" ({e.hint})" if e.hint else "")


def _read(folder: Path) -> Adapter:
    """A small folder as `read_adapter` reads it, without torch where NumPy has its types."""
    try:
        with Hashing() as hashing:
            return begin_adapter(folder, hashing, begin=begin_arrays)()
    except NoArrayError:
        return read_adapter(folder)


def _mapped(folder: Path) -> Adapter:
    """A large folder with its numbers in the file's own pages; its bytes are hashed where a manifest has their hash."""
    try:
        adapter = begin_adapter(folder, None, begin=begin_arrays)()
    except NoArrayError:
        return read_adapter(folder)
    require_whole(folder, read=True)
    return adapter


def _from_headers(folder: Path) -> Adapter:
    """A large folder without its numbers; files are held against its manifest by their sizes, and the config by its hash."""
    adapter = begin_adapter(folder, None, begin=begin_shapes)()
    require_whole(folder, read=False, known={CONFIG: sha256_file(folder / CONFIG)})
    return adapter


def squares_of(adapter: Adapter) -> list[float] | None:
    """The squared length of each module's update; None where no numbers were read."""
    squares: list[float] = []
    mapped = adapter.nbytes > READ_WHOLE
    for f in adapter.modules.values():
        if isinstance(f.A, Shape):
            return None
        squares.append(f.norm_squared())
        if mapped and isinstance(f.A, Array):  # its pages need not stay
            let_go(f.A, f.B)
    return squares
