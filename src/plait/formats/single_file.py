"""LoRA files of kohya and diffusers, read into an `Adapter` and written from one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapters.beside import require_filled
from plait.adapters.conv import as_matrices, as_stored, with_middle
from plait.adapters.key_names import without_adapter_name
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.naming import checked_name
from plait.adapters.sealed import read_sealed, write_sealed
from plait.adapters.tensors import all_finite, widened
from plait.disk.files import sha256_json
from plait.errors import InputError
from plait.formats.alpha import scalings_of
from plait.formats.keys import DIFFUSERS, KOHYA, MIDDLE, ORIGINAL, Parsed, parse, tensor_names
from plait.formats.layouts import original_prefix
from plait.formats.recognised import RECORD, file_record

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BASE_KEYS = ("ss_base_model_version", "modelspec.architecture")


def read_lora_file(path: str | Path, *, name: str | None = None) -> Adapter:
    """Read a kohya or diffusers LoRA file.

    Scaling is alpha / rank, wherever alpha stands (see `formats.alpha`). Module names stay as the file has them (diffusers'
    processor names become the modules they belong to), so that a merge needs no knowledge of the model. A middle factor
    between A and B (LyCORIS' Tucker decomposition of a convolution) is multiplied into A.

    Args:
        path: A safetensors file.
        name: What to call it; by default the file's name without its suffix.

    Raises:
        InputError: Damaged, incomplete, holding NaN, of mixed formats, or of a refused variant; names file and tensor.
        Damaged: Written by plait, and changed since.
    """
    path = Path(path)
    stored, metadata, digest = read_sealed(path)
    require_filled(stored, str(path))
    tensors = without_adapter_name({key: widened(tensor) for key, tensor in stored.items()}, str(path))
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES and not key.endswith(".alpha"):
            raise InputError(
                f"tensor {key!r} is {tensor.dtype}", where=str(path), hint="expected 8, 16, 32 or 64 bit floats"
            )
        if tensor.is_floating_point() and not all_finite(tensor.float()):
            raise InputError(f"tensor {key!r} holds NaN or infinity", where=str(path))
    found = parse(tensors, str(path))
    if found.format == DIFFUSERS and original_prefix(found.halves) is not None:
        found.format = ORIGINAL
    record = file_record(metadata, path)
    modules = {m: _matrices(m, found, path) for m in sorted(found.halves)}
    ranks = {m: f.rank for m, f in modules.items()}
    scalings = scalings_of(found, ranks, metadata, path, written_here=record is not None)
    modules = {m: replace(f, scaling=scalings.of[m]) for m, f in modules.items()}
    return Adapter(
        name=checked_name(name or _plain_name(path), "adapter"),
        base=_base(metadata, record),
        modules=modules,
        source={
            "path": str(path),
            # Where a config beside the file scales it, what is read is more than the file.
            "sha256": sha256_json({"file": digest, "scalings": scalings.of}) if scalings.places else digest,
            "format": found.format,
            "layouts": found.layouts,
            "tucker": sum(MIDDLE in half for half in found.halves.values()),
            "without_alpha": scalings.by_format,
            "alpha_from": list(scalings.places),
        },
    )


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
    tensors: dict[str, Tensor] = {}
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
            tensors[f"{module}.alpha"] = _stored_alpha(factors)
    metadata = {"ss_network_module": "networks.lora", **_dimensions(adapter)} if format == KOHYA else {}
    if adapter.base and format == KOHYA:
        metadata["ss_base_model_version"] = adapter.base
    if record is not None:
        metadata[RECORD] = json.dumps(record, sort_keys=True, allow_nan=False)
    write_sealed(path, tensors, metadata)


def unscaled(factors: LoraFactors) -> LoraFactors:
    """The same delta with scaling 1.

    B stays in its dtype where that is exact (a power of two, mostly), else it becomes float32: at most 6e-8 of an entry.
    """
    if factors.scaling == 1.0:
        return factors
    folded = factors.B * factors.scaling
    if not torch.equal(folded.double(), factors.B.double() * factors.scaling):
        folded = factors.B.to(torch.promote_types(factors.B.dtype, torch.float32)) * factors.scaling
    return LoraFactors(factors.A, folded, 1.0, factors.kind)


def _stored_alpha(factors: LoraFactors) -> Tensor:
    """Alpha in the factors' dtype, as kohya has it, where that holds it; else in float32."""
    alpha = torch.tensor(factors.scaling * factors.rank, dtype=torch.float64)
    short = alpha.to(factors.A.dtype)
    near = abs(float(short) - float(alpha)) <= 1e-12 * float(alpha)
    return short if near else alpha.float()


def _dimensions(adapter: Adapter) -> dict[str, str]:
    """What kohya's tools show: the commonest rank and alpha."""
    rank, alpha = Counter((f.rank, f.scaling * f.rank) for f in adapter.modules.values()).most_common(1)[0][0]
    return {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
