"""A LoRA as one GGUF file, as llama.cpp loads it beside a base: `--lora FILE`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import EMBEDDING, LINEAR, Adapter
from plait.adapters.sealed import SEAL, SEALED, is_sealed, require_seal, sealed
from plait.border.checked import shown
from plait.disk.store import read_json
from plait.errors import InputError, RunError
from plait.formats.gguf_names import GgufLayout, gguf_layout, gguf_package, reordered

RECORD = "plait.record"
_OUTPUTS = ("lm_head", "embed_out")
# Model types whose output layer is their embedding where a config does not say: files of transformers 4 do not.
TIED = ("gpt2", "gemma", "gemma2", "gemma3_text", "smollm3", "starcoder2")


def base_config(base: str | Path) -> dict[str, Any]:
    """The config.json of a local base folder.

    Raises:
        InputError: No such folder, or no config in it.
    """
    file = Path(base) / "config.json"
    if not file.is_file():
        raise InputError("no config.json of the base", where=str(base), hint="--base DIR, the folder of the base model")
    config = read_json(file)
    if not isinstance(config, dict):
        raise InputError("not a JSON object", where=str(file))
    return config


def gguf_tensors(
    adapter: Adapter, config: Mapping[str, Any], where: str
) -> tuple[dict[str, Tensor], float, GgufLayout]:
    """An adapter's tensors as llama.cpp names and scales them, all float32, and the one alpha that goes with them.

    llama.cpp multiplies B @ A by alpha / rank of each module, with one alpha for all. It is the commonest; where a module has
    another scaling, its B takes the difference.

    Raises:
        InputError: Heads, whole weights, kinds of modules or tied embeddings that such a file cannot express.
    """
    _require_expressible(adapter, config)
    layout = gguf_layout([adapter.full_name(m) for m in adapter.modules], config, where)
    alphas = Counter(f.scaling * f.rank for f in adapter.modules.values())
    alpha = float(np.float32(max(alphas, key=lambda a: (alphas[a], a))))
    found: dict[str, Tensor] = {}
    for module, factors in adapter.modules.items():
        name = adapter.full_name(module)
        A, B = factors.A.float(), factors.B.float()
        if factors.scaling * factors.rank != alpha:
            B = (B.double() * (factors.scaling * factors.rank / alpha)).float()
        if name in layout.heads:
            B = _reordered(B, layout.heads[name], name)
        # rows of the embedding's A are looked up by token
        found[f"{layout.names[name]}.lora_a"] = (A.T if factors.kind == EMBEDDING else A).contiguous()
        found[f"{layout.names[name]}.lora_b"] = B.contiguous()
    return found, alpha, layout


def _require_expressible(adapter: Adapter, config: Mapping[str, Any]) -> None:
    if adapter.heads:
        raise InputError(
            f"it carries heads ({', '.join(adapter.heads)}), which llama.cpp does not load", where=adapter.name
        )
    if adapter.extras:
        raise InputError(f"{next(iter(adapter.extras))!r} was trained whole: no LoRA update", where=adapter.name)
    if kind := next((f.kind for f in adapter.modules.values() if f.kind not in (LINEAR, EMBEDDING)), None):
        raise InputError(f"{kind} modules have no place in a GGUF adapter", where=adapter.name)
    said = config.get("tie_word_embeddings")
    if not (said if said is not None else config.get("model_type") in TIED):
        return
    for module, factors in adapter.modules.items():
        if factors.kind == EMBEDDING or module.rpartition(".")[2] in _OUTPUTS:
            raise InputError(
                f"{module!r} is tied to the other end of the model, which llama.cpp keeps as one tensor",
                where=adapter.name,
                hint="bake it instead: plait merge --bake",
            )


def _reordered(B: Float[Tensor, "out r"], heads: int, name: str) -> Float[Tensor, "out r"]:
    try:
        return reordered(B, heads)
    except ValueError as e:
        raise InputError(str(e), where=name, hint="is --base the base of this adapter?") from None


def write_gguf(
    path: Path, tensors: Mapping[str, Tensor], alpha: float, architecture: str, name: str, record: Mapping[str, Any]
) -> None:
    """Write a GGUF adapter.

    Args:
        path: The file.
        tensors: From `gguf_tensors`.
        alpha: `adapter.lora.alpha`.
        architecture: `general.architecture`.
        name: `general.name`.
        record: What it is and how it came to be; kept in the file as JSON, which llama.cpp passes over.
    """
    gguf = gguf_package()
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    facts = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": _text(alpha),
        "general.name": name,
        RECORD: text,
    }
    digest = sealed(tensors, facts)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_name(name)
    writer.add_string(RECORD, text)
    for key in (SEALED, SEAL):
        writer.add_string(key, digest[key])
    for key in sorted(tensors):
        writer.add_tensor(key, np.ascontiguousarray(tensors[key].numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _text(value: object) -> str:
    return repr(float(value)) if isinstance(value, float | np.floating) else str(value)


def require_gguf_seal(reader: Any, path: Path) -> bool:
    """Refuse a GGUF file that is not the one that plait wrote; whether it holds a digest to compare.

    Args:
        reader: Of the `gguf` package, on the file.
        path: The file.

    Raises:
        Damaged: Its tensors or fields are others than those that were written.
        InputError: A field cannot be read.
    """
    facts = {k: _text(gguf_field(reader, k, path)) for k in reader.fields if not k.startswith("GGUF.")}
    if is_sealed(facts):
        require_seal({t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}, facts, str(path))
    return is_sealed(facts)


def gguf_field(reader: Any, key: str, path: Path) -> Any:
    """A field of a GGUF file; None where there is none.

    Raises:
        InputError: It cannot be read.
    """
    field = reader.get_field(key)
    try:
        return None if field is None else field.contents()
    except (ValueError, IndexError, KeyError, TypeError) as e:  # of bytes that are no text
        raise InputError(f"its field {shown(key)} cannot be read: {e}", where=str(path), hint="copy it again") from None


def gguf_record(path: Path) -> dict[str, Any] | None:
    """The record of a GGUF file that `write_gguf` wrote; None for others."""
    try:
        field = gguf_package().GGUFReader(str(path)).get_field(RECORD)
        found = json.loads(field.contents()) if field is not None else None
    except (ValueError, OSError, KeyError, IndexError):
        return None
    return found if isinstance(found, dict) else None


def require_written(path: Path, tensors: Mapping[str, Tensor], alpha: float, architecture: str) -> None:
    """Read a GGUF adapter again, by the reader of the `gguf` package, and compare every number.

    Raises:
        RunError: It is not what was to be written.
    """
    reader = gguf_package().GGUFReader(str(path))
    facts = {k: reader.get_field(k).contents() for k in ("general.architecture", "adapter.type", "adapter.lora.alpha")}
    wanted = {"general.architecture": architecture, "adapter.type": "lora", "adapter.lora.alpha": alpha}
    found = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    wrong = [k for k in wanted if facts[k] != wanted[k]]
    wrong += [k for k in sorted({*found, *tensors}) if k not in found or k not in tensors]
    wrong += [k for k in tensors if k in found and not torch.equal(found[k], tensors[k])]
    if wrong:
        raise RunError(f"{wrong[0]} is not what was written", where=str(path), hint="please report this")
