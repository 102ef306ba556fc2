"""Numbers that are none: NaN and infinity in an adapter's own files, which every loader takes without a word."""

from __future__ import annotations

from pathlib import Path

from plait.adapters.config import CONFIG
from plait.adapters.tensors import all_finite, read_tensors
from plait.errors import InputError
from plait.loading.contents import MLX_WEIGHTS


def not_finite(path: Path) -> tuple[str, ...]:
    """Name the tensors of an adapter that hold NaN or infinity.

    Args:
        path: An adapter's folder, or a LoRA file.

    Returns:
        "file what" each; nothing for folders without an adapter, and of files that cannot be read, which their loaders tell.

    Cost: reading the adapter's files once, one of them in memory at a time.
    """
    problems = []
    for file in [path] if path.is_file() else _files(path):
        try:
            tensors = read_tensors(file)[0]
        except InputError:
            continue
        problems += [f"{file.name}: {n} holds NaN or infinity" for n, t in sorted(tensors.items()) if not all_finite(t)]
    return tuple(problems)


def _files(folder: Path) -> list[Path]:
    if not (folder / CONFIG).is_file():
        return []
    own = [*folder.glob("adapter_model*.safetensors"), *folder.glob(MLX_WEIGHTS), *folder.glob("heads/*.safetensors")]
    return sorted(file for file in own if file.is_file())
