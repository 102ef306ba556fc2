"""What lies at a path: a PEFT folder, the components of a pipeline, a whole model, or a file of factors; headers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.errors import InputError
from plait.loading.gguf import GGUF_MAGIC, GgufHeader, read_gguf
from plait.loading.header import Header, Stored, read_header, read_object
from plait.loading.settings import CONFIG, Settings, read_settings

WEIGHTS, INDEX, PICKLE = "adapter_model.safetensors", "adapter_model.safetensors.index.json", "adapter_model.bin"
MODEL, MODEL_INDEX, MODEL_CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MLX_WEIGHTS = "adapters.safetensors"
_SUBFOLDERS = 256


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """A folder with adapter_config.json.

    Args:
        path: The folder.
        settings: Its config.
        header: Its weights; with several files, of all of them.
        beside: Tensors of other files in it: ``file:name`` -> tensor.
        sharded: Whether the weights lie in several files, which an index lists.
        model_config: Whether a config.json lies there too.
        record: What plait's manifest says of the result; empty without one.
    """

    path: Path
    settings: Settings
    header: Header
    beside: Mapping[str, Stored] = field(default_factory=dict)
    sharded: bool = False
    model_config: bool = False
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoraFile:
    """One safetensors file of factors (kohya, diffusers, the model's authors)."""

    path: Path
    header: Header


@dataclass(frozen=True, slots=True)
class MlxFolder:
    """An adapter of mlx-lm: adapters.safetensors and its config."""

    path: Path
    config: Mapping[str, Any]
    header: Header


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file."""

    path: Path
    header: GgufHeader


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A whole model: config.json and model.safetensors or its shards.

    Args:
        path: The folder.
        config: Its config.json.
        files: File -> its header.
        index: Tensor -> file, where an index lists several.
        beside: Tensors of other files in it.
    """

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, Header]
    index: Mapping[str, str] | None
    beside: Mapping[str, Stored] = field(default_factory=dict)


Contents = PeftFolder | LoraFile | MlxFolder | GgufFile | ModelFolder


def contents(path: Path) -> tuple[Contents, ...]:
    """What a loader could open at a path; of a folder of folders, what is in each of them.

    Returns:
        In the order of names; empty where no adapter, model or file of factors is there.

    Raises:
        InputError: Nothing is there, or what is there cannot be read.
    """
    if path.is_file():
        return (_file(path),)
    if not path.is_dir():
        raise InputError("no such folder or file", where=str(path))
    if (own := _folder(path)) is not None:
        return (own,)
    try:
        inside = sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith("."))
    except OSError as e:
        raise InputError(e.strerror or "cannot be read", where=str(path)) from None
    found = (_folder(p) for p in inside[:_SUBFOLDERS])
    return tuple(c for c in found if c is not None)


def _file(path: Path) -> Contents:
    try:
        with path.open("rb") as f:
            start = f.read(4)
    except OSError as e:
        raise InputError(e.strerror or "cannot be read", where=str(path)) from None
    return GgufFile(path, read_gguf(path)) if start == GGUF_MAGIC else LoraFile(path, read_header(path))


def _folder(path: Path) -> Contents | None:
    if (path / CONFIG).exists():
        if (path / MLX_WEIGHTS).exists() and not (path / WEIGHTS).exists():
            return MlxFolder(path, read_object(path / CONFIG), read_header(path / MLX_WEIGHTS))
        return _peft_folder(path)
    if (path / MODEL_CONFIG).exists() and ((path / MODEL).exists() or (path / MODEL_INDEX).exists()):
        return _model_folder(path)
    return None


def _peft_folder(path: Path) -> PeftFolder:
    settings = read_settings(path)
    shards = _listed(path / INDEX) if (path / INDEX).exists() and not (path / WEIGHTS).exists() else None
    if shards is None and not (path / WEIGHTS).exists() and (path / PICKLE).exists():
        raise InputError(f"{PICKLE} is a pickle, which is not opened", where=str(path), hint="save it as safetensors")
    if shards is None:
        header = read_header(path / WEIGHTS)
    else:
        headers = [read_header(path / name) for name in sorted(set(shards.values()))]
        header = Header({n: t for h in headers for n, t in h.tensors.items()}, {})
    own = {WEIGHTS, *(shards or {}).values()}
    record = read_object(path / "plait.json").get("result") if (path / "plait.json").exists() else None
    return PeftFolder(
        path, settings, header, dict(_beside(path, own)), shards is not None, (path / MODEL_CONFIG).exists(),
        record if isinstance(record, dict) else {},
    )  # fmt: skip


def _model_folder(path: Path) -> ModelFolder:
    index = _listed(path / MODEL_INDEX) if not (path / MODEL).exists() else None
    names = [MODEL] if index is None else sorted(set(index.values()))
    files = {name: read_header(path / name) for name in names if index is None or (path / name).exists()}
    return ModelFolder(path, read_object(path / MODEL_CONFIG), files, index, dict(_beside(path, set(names))))


def _listed(path: Path) -> dict[str, str]:
    """Tensor -> file of an index."""
    found = read_object(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(v, str) and Path(v).name == v for v in found.values()):
        raise InputError("no weight_map from tensors to files beside it", where=str(path))
    return found


def _beside(path: Path, own: set[str]) -> Iterator[tuple[str, Stored]]:
    """Tensors of safetensors files that are not the weights themselves."""
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*/*.safetensors")]):
        name = file.relative_to(path).as_posix()
        if name not in own and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield from ((f"{name}:{tensor}", stored) for tensor, stored in read_header(file).tensors.items())
