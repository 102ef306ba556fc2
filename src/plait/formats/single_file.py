"""LoRA files of kohya and diffusers, read into an `Adapter` and written from one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.adapters.arrays import FLOAT32, Array, Kind, floats, rounded, widened
from plait.adapters.beside import require_filled
from plait.adapters.conv import as_matrices, as_stored, with_middle
from plait.adapters.file_bytes import Mapped
from plait.adapters.hashing import Hashing
from plait.adapters.key_names import without_adapter_name
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.naming import checked_name
from plait.adapters.peft_format import PutFactors
from plait.adapters.sealed import fill_sealed, require_seal, write_sealed
from plait.adapters.tensor_file import Put, is_finite
from plait.adapters.weights import Begin, with_torch
from plait.disk.files import sha256_json
from plait.errors import InputError
from plait.formats.alpha import scalings_of
from plait.formats.keys import DIFFUSERS, KOHYA, MIDDLE, ORIGINAL, Parsed, parse, tensor_names
from plait.formats.layouts import original_prefix
from plait.formats.recognised import RECORD, file_record

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = ("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")
_ALPHA = ".alpha"
_BASE_KEYS = ("ss_base_model_version", "modelspec.architecture")


def read_lora_file(path: str | Path, *, name: str | None = None) -> Adapter:
    """Read a kohya or diffusers LoRA file, as `begin_lora_file` has it."""
    with Hashing() as hashing:
        return begin_lora_file(path, hashing, name=name)()


def begin_lora_file(
    path: str | Path,
    hashing: Hashing | None,
    *,
    name: str | None = None,
    begin: Begin | None = None,
    mapped: Mapped | None = None,
) -> Callable[[], Adapter]:
    """Read a kohya or diffusers LoRA file, but for its hash, which may be on its way yet.

    Scaling is alpha / rank, wherever alpha stands (see `formats.alpha`). Module names stay as the file has them (diffusers'
    processor names become the modules they belong to), so that a merge needs no knowledge of the model. A middle factor
    between A and B (LyCORIS' Tucker decomposition of a convolution) is multiplied into A.

    Args:
        path: A safetensors file.
        hashing: Hashes its bytes; None does without, and `source` holds no "sha256".
        name: What to call it; by default the file's name without its suffix.
        begin: Reads the file, by default as torch's tensors; see `plait.adapters.weights`.
        mapped: Keeps the file, whose own pages are then used, where `begin` can do that.

    Returns:
        A function that waits for the hash and gives the adapter.

    Raises:
        InputError: Damaged, incomplete, holding NaN, of mixed formats, or of a refused variant; names file and tensor.
        Damaged: Written by plait, and changed since.
    """
    path = Path(path)
    stored, metadata, digest = (begin or with_torch())(path, hashing, **({"mapped": mapped} if mapped else {}))
    require_seal(stored, metadata, str(path))
    require_filled(stored, str(path))
    tensors = without_adapter_name({key: widened(tensor) for key, tensor in stored.items()}, str(path))
    for key, tensor in tensors.items():
        if str(tensor.dtype) not in _DTYPES and not key.endswith(".alpha"):
            raise InputError(
                f"tensor {key!r} is {tensor.dtype}", where=str(path), hint="expected 8, 16, 32 or 64 bit floats"
            )
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise InputError(f"tensor {key!r} holds NaN or infinity", where=str(path))
        if mapped:
            mapped.passed(tensor.nbytes)
    found = parse(tensors, str(path))
    if found.format == DIFFUSERS and original_prefix(found.halves) is not None:
        found.format = ORIGINAL
    record = file_record(metadata, path)
    modules = {m: _matrices(m, found, path) for m in sorted(found.halves)}
    ranks = {m: f.rank for m, f in modules.items()}
    scalings = scalings_of(found, ranks, metadata, path, written_here=record is not None)
    modules = {m: replace(f, scaling=scalings.of[m]) for m, f in modules.items()}
    facts = {
        "format": found.format,
        "layouts": found.layouts,
        "tucker": sum(MIDDLE in half for half in found.halves.values()),
        "without_alpha": scalings.by_format,
        "alpha_from": list(scalings.places),
    }
    known = checked_name(name or _plain_name(path), "adapter")

    def whole() -> Adapter:
        # Where a config beside the file scales it, what is read is more than the file.
        hashed = sha256_json({"file": digest(), "scalings": scalings.of}) if scalings.places else digest()
        source = {"path": str(path), **({"sha256": hashed} if hashing else {}), **facts}
        return Adapter(known, _base(metadata, record), modules, source=source)

    return whole


def _is_finite(tensor: Tensor | Array) -> bool:
    """Whether its numbers are finite, in float32 too, in which they are merged."""
    if tensor.itemsize <= 4:
        return is_finite(tensor)
    return is_finite(rounded(tensor.data, FLOAT32) if isinstance(tensor, Array) else tensor.float())


def _plain_name(path: Path) -> str:
    """The file's name, made fit for a name: spaces and what else people put there become underscores."""
    kept = "".join(c if c.isalnum() or c in "._+-" else "_" for c in path.name.removesuffix(".safetensors"))
    return kept.strip("._-+")[:100]


def _base(metadata: Mapping[str, str], record: Mapping[str, Any] | None) -> str:
    if record and isinstance(record.get("result", {}).get("base"), str):
        return str(record["result"]["base"])
    return next((metadata[k] for k in _BASE_KEYS if metadata.get(k)), "")


def _matrices(module: str, found: Parsed, path: Path) -> LoraFactors:
    """A module's factors as matrices, their scaling yet to come."""
    where = f"{path}: {module}"
    half = found.halves[module]
    A = with_middle(half["A"], half[MIDDLE], half["B"], where) if MIDDLE in half else half["A"]
    A, B, kind = as_matrices(A, half["B"], where)
    if A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise InputError(f"A {tuple(A.shape)} and B {tuple(B.shape)} have no rank in common", where=where)
    return LoraFactors(A, B, 1.0, kind)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_lora_file(path: Path, adapter: Adapter, format: str, record: Mapping[str, Any] | None = None) -> None:
    """Write an adapter whose modules are named as the format has them (see `formats.names`).

    kohya: every module with its alpha. The others: no alphas, so scalings must be 1 (see `unscaled`).

    Args:
        path: The file.
        adapter: Without heads and extras, which these formats do not know.
        format: "kohya", "diffusers" or "original".
        record: Kept in the metadata, as a folder keeps its plait.json.

    Raises:
        InputError: Heads, extras or embeddings.
    """
    write_sealed(path, tensors_of(adapter, format), texts_of(adapter, format, record))


def stream_lora_file(
    path: Path,
    shapes: Adapter,
    format: str,
    fill: Callable[[PutFactors], None],
    longest: Mapping[str, Any],
    record: Callable[[], Mapping[str, Any]],
    check: Callable[[], None] | None = None,
) -> None:
    """Write what `write_lora_file` writes, module by module; none is held.

    Args:
        path: The file.
        shapes: The adapter, with shapes and types in the place of its factors.
        format: See `write_lora_file`, whose errors this raises.
        fill: Called with a function that takes (module, factors), once for each, in any order, from any thread.
        longest: A record that is as long as the one to come, or a little longer.
        record: Gives it, once all modules are in the file.
        check: Looks at the file then, while it is hashed.
    """
    tensors = tensors_of(shapes, format)

    def put_factors(put: Put) -> None:
        for name, tensor in tensors.items():
            if name.endswith(_ALPHA):
                put(name, tensor)

        def one(module: str, factors: LoraFactors) -> None:
            names = tensor_names(format, module, shapes.source.get("layouts", {}))
            for name, tensor in zip(names, as_stored(factors), strict=True):
                put(name, tensor)

        fill(one)

    fill_sealed(
        path,
        tensors,
        put_factors,
        texts_of(shapes, format, longest),
        lambda: texts_of(shapes, format, record()),
        check,
    )


def tensors_of(adapter: Adapter, format: str) -> dict[str, Tensor | Array]:
    """The tensors of a file by name; raises as `write_lora_file`."""
    tensors: dict[str, Tensor | Array] = {}
    if adapter.heads or adapter.extras:
        raise InputError(f"{format} files hold no heads and no whole weights", where=adapter.name, hint="--to peft")
    layouts = adapter.source.get("layouts", {})
    for module, factors in adapter.modules.items():
        if factors.kind == "embedding":
            raise InputError(f"{format} files hold no embedding updates", where=module, hint="--to peft")
        if format != KOHYA and factors.scaling != 1.0:
            raise InputError(f"scaling {factors.scaling:g}: {format} files have no alphas", where=module)
        a, b = tensor_names(format, module, layouts)
        tensors[a], tensors[b] = as_stored(factors)
        if format == KOHYA:
            tensors[f"{module}{_ALPHA}"] = _stored_alpha(factors)
    return tensors


def texts_of(adapter: Adapter, format: str, record: Mapping[str, Any] | None) -> dict[str, str]:
    """The metadata of a file."""
    metadata = {"ss_network_module": "networks.lora", **_dimensions(adapter)} if format == KOHYA else {}
    if adapter.base and format == KOHYA:
        metadata["ss_base_model_version"] = adapter.base
    if record is not None:
        metadata[RECORD] = json.dumps(record, sort_keys=True, allow_nan=False)
    return metadata


def unscaled(factors: LoraFactors) -> LoraFactors:
    """The same delta with scaling 1.

    B stays in its dtype where that is exact (a power of two, mostly), else it becomes float32: at most 6e-8 of an entry.
    """
    if factors.scaling == 1.0:
        return factors
    import torch

    folded = factors.B * factors.scaling
    if not torch.equal(folded.double(), factors.B.double() * factors.scaling):
        folded = factors.B.to(torch.promote_types(factors.B.dtype, torch.float32)) * factors.scaling
    return LoraFactors(factors.A, folded, 1.0, factors.kind)


def _stored_alpha(factors: LoraFactors) -> Array:
    """Alpha in the factors' dtype, as kohya has it, where that holds it; else in float32."""
    alpha = factors.scaling * factors.rank
    name = str(factors.A.dtype).removeprefix("torch.")
    if name == "float64":
        return Array(np.array(alpha), Kind(name))
    short = rounded(np.array([alpha], np.float32), name)
    held = short if abs(float(floats(short)[0]) - alpha) <= 1e-12 * alpha else rounded(np.array([alpha]), FLOAT32)
    return Array(held.data.reshape(()), held.dtype)


def _dimensions(adapter: Adapter) -> dict[str, str]:
    """What kohya's tools show: the commonest rank and alpha."""
    rank, alpha = Counter((f.rank, f.scaling * f.rank) for f in adapter.modules.values()).most_common(1)[0][0]
    return {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
