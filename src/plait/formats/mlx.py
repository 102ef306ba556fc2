"""Adapters of mlx-lm: a folder of adapters.safetensors and a config of its own, read into an `Adapter` and written from one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.adapters.arrays import widened
from plait.adapters.config import CONFIG, LARGEST_CONFIG
from plait.adapters.lora import LINEAR, Adapter, LoraFactors
from plait.adapters.naming import checked_name
from plait.adapters.tensor_file import is_finite, write_tensors
from plait.border.checked import Record
from plait.border.module_names import named_by
from plait.disk.files import read_json, sha256_file, sha256_json
from plait.errors import InputError
from plait.formats.keys import MLX
from plait.formats.recognised import MLX_FILE
from plait.formats.single_file import unscaled

if TYPE_CHECKING:
    from torch import Tensor

_A, _B, _MAGNITUDE = ".lora_a", ".lora_b", ".m"
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embedding"}
_EVERYWHERE = -1  # num_layers with which mlx-lm takes keys as names of the whole model alone


def read_mlx(path: str | Path, *, name: str | None = None) -> Adapter:
    """Read an adapter of mlx-lm: A = lora_a^T, B = lora_b^T, scaling = the config's `scale`.

    Module names are those of mlx-lm's model, which for most architectures are transformers'.

    Args:
        path: The folder, or its adapters.safetensors.
        name: What to call it; by default the folder's name.

    Raises:
        InputError: A full fine-tune, DoRA, experts or embeddings (named, with the reason), or damaged.
    """
    folder = Path(path).parent if Path(path).name == MLX_FILE else Path(path)
    config = Record.of(read_json(folder / CONFIG, limit=LARGEST_CONFIG), str(folder / CONFIG))
    kind = config.text("fine_tune_type", "lora", choices=("lora", "dora", "full"))
    if kind != "lora":
        why = "it holds whole weights" if kind == "full" else "it also trains a magnitude per output"
        raise InputError(f"fine_tune_type {kind}: {why}, which no plain LoRA does", where=str(folder), hint=_FUSE)
    parameters = config.record("lora_parameters")
    if parameters.has("alpha"):
        raise InputError(
            "lora_parameters hold an alpha: early versions of mlx-lm multiplied scale by alpha / rank, today's pass over it",
            where=str(folder / CONFIG),
            hint="take alpha out, and write into scale what the version that trained it applied",
        )
    rank, scale = parameters.integer("rank", 1, 1 << 16), parameters.number("scale", 0.0, 1e30, above=True)
    from plait.adapters.tensors import read_tensors

    tensors, _, digest = read_tensors(folder / MLX_FILE)
    modules = _modules({k: widened(t) for k, t in tensors.items()}, rank, scale, folder)
    keys = parameters.texts("keys", ())
    if lost := [m for m in modules if keys and not any(named_by(m, k) for k in keys)]:
        raise InputError(
            f"module {lost[0]!r} is none of the config's keys", where=str(folder), hint="restore the config"
        )
    return Adapter(
        name=checked_name(name or folder.resolve().name, "adapter"),
        base=config.text("model", ""),
        modules=modules,
        task_type="CAUSAL_LM",
        source={
            "path": str(folder),
            "sha256": sha256_json(
                {MLX_FILE: digest, CONFIG: sha256_file(folder / CONFIG)}
            ),  # the config scales the weights
            "format": MLX,
            "scale": scale,
        },
    )


_FUSE = "mlx_lm.fuse writes it into its base; a LoRA of that model is another way"


def _modules(tensors: Mapping[str, Tensor], rank: int, scale: float, folder: Path) -> dict[str, LoraFactors]:
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in (_A, _B) if key.endswith(s)), None)
        if key.endswith(_MAGNITUDE):
            raise InputError(f"DoRA ({key!r}): it also trains a magnitude per output", where=str(folder), hint=_FUSE)
        if suffix is None:
            raise InputError(
                f"tensor {key!r} is no half of a LoRA", where=str(folder), hint="expected lora_a and lora_b"
            )
        if tensor.ndim == 3:
            raise InputError(
                f"{key!r} adapts the experts of a mixture at once, which has no plain LoRA here",
                where=str(folder),
                hint=_FUSE,
            )
        if tensor.ndim != 2 or not tensor.is_floating_point() or not is_finite(tensor.float()):
            raise InputError(f"{key!r} is {tensor.dtype} {tuple(tensor.shape)}, expected finite", where=str(folder))
        halves.setdefault(key.removesuffix(suffix), {})[suffix] = tensor
    if not halves:
        raise InputError("holds no lora_a and lora_b", where=str(folder / MLX_FILE))
    return {m: _factors(m, halves[m], rank, scale, folder) for m in sorted(halves)}


def _factors(module: str, half: Mapping[str, Tensor], rank: int, scale: float, folder: Path) -> LoraFactors:
    if lacking := {_A, _B} - half.keys():
        raise InputError(f"module {module!r} has no {lacking.pop()[1:]}", where=str(folder), hint="copy it again")
    if module.rpartition(".")[2] in _EMBEDDINGS:
        raise InputError(
            f"{module!r} is an embedding: mlx-lm applies its update to the output as well where the two are tied, PEFT does not",
            where=str(folder),
            hint=_FUSE,
        )
    a, b = half[_A], half[_B]
    if a.shape[1] != rank or b.shape[0] != rank:
        raise InputError(
            f"module {module!r}: lora_a {tuple(a.shape)}, lora_b {tuple(b.shape)}, and rank {rank} in {CONFIG} disagree",
            where=str(folder),
        )
    return LoraFactors(a.T.contiguous(), b.T.contiguous(), scale)


def write_mlx(folder: Path, adapter: Adapter) -> None:
    """Write an adapter into an existing folder as mlx-lm's `load(model, adapter_path=FOLDER)` reads it.

    mlx-lm knows one rank and one scale: smaller ranks are padded with zeros, and scalings that differ go into lora_b. The
    keys are whole module names, which it takes however many layers the model has.

    Raises:
        InputError: Heads, whole weights, or modules that are not linear.
    """
    if adapter.heads or adapter.extras:
        raise InputError("mlx-lm's adapters hold no heads and no whole weights", where=adapter.name, hint="--to peft")
    if odd := next((m for m, f in adapter.modules.items() if f.kind != LINEAR), None):
        raise InputError(
            f"{odd!r} is {adapter.modules[odd].kind}, not linear: mlx-lm means something else by that",
            where=adapter.name,
        )
    scalings = {f.scaling for f in adapter.modules.values()}
    alike = len(scalings) == 1 and min(scalings) > 0
    rank = adapter.rank
    import torch

    tensors: dict[str, Tensor] = {}
    for module, factors in adapter.modules.items():
        f = factors if alike else unscaled(factors)
        name, extra = adapter.full_name(module), rank - f.rank
        tensors[name + _A] = torch.nn.functional.pad(f.A, (0, 0, 0, extra)).T.contiguous()
        tensors[name + _B] = torch.nn.functional.pad(f.B, (0, extra)).T.contiguous()
    write_tensors(folder / MLX_FILE, tensors, {"format": "mlx"})
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "model": adapter.base,
        "num_layers": _EVERYWHERE,
        "lora_parameters": {
            "rank": rank,
            "scale": scalings.pop() if alike else 1.0,
            "dropout": 0.0,
            "keys": sorted(adapter.full_name(m) for m in adapter.modules),
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
