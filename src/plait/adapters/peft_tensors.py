"""Between the tensors of a PEFT file and factors: what their names mean, and which belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plait.adapters.config import CONFIG, AdapterConfig
from plait.adapters.conv import as_matrices, as_stored, refuse_groups, stored_as
from plait.adapters.experts import (
    WRAPPED,
    Waiting,
    experts_of,
    parameter_names,
    require_whole,
    stacked,
    stacks_of,
    stored_names,
)
from plait.adapters.lora import EMBEDDING, EXPERT, LINEAR, Adapter, LoraFactors
from plait.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

ROOT = "base_model.model."
SUFFIXES = {
    ".lora_A.weight": ("A", LINEAR),
    ".lora_B.weight": ("B", LINEAR),
    ".lora_embedding_A": ("A", EMBEDDING),
    ".lora_embedding_B": ("B", EMBEDDING),
}

_WIDEST = 1 << 24  # no vocabulary has sixteen million words
_MOST_EXPERTS = 1024  # whose factors lie in one tensor, one after another


def require_sides(shapes: Mapping[str, tuple[int, ...]], folder: Path, config: AdapterConfig | None = None) -> None:
    """Refuse what the header alone refutes, before gigabytes are read: sides wider than any, ranks that are not the config's.

    Raises:
        InputError: Names the tensor.
    """
    halves = [(key, suffix, half) for key in shapes for suffix, (half, _) in SUFFIXES.items() if key.endswith(suffix)]
    modules = {key: key.removeprefix(ROOT).removesuffix(suffix) for key, suffix, _ in halves}
    promised = config.promised(list(dict.fromkeys(modules.values()))) if config else {}
    for key, _, half in halves:
        shape, wrong = shapes[key], ""
        if max(shape, default=0) > _WIDEST:
            wrong = "wider than any layer"
        elif config and len(shape) >= 2 and shape[half == "B"] > promised[modules[key]][0] * _MOST_EXPERTS:
            wrong = f"and the rank in {CONFIG} is {promised[modules[key]][0]}"
        if wrong:
            raise InputError(f"tensor {key!r} is {shape}, {wrong}", where=str(folder), hint="save it again")


def all_factors(
    halves: Mapping[str, Mapping[str, Tensor]], kinds: Mapping[str, str], config: AdapterConfig, folder: Path
) -> dict[str, LoraFactors]:
    """Every module's factors, and those of parameters taken apart into their experts'.

    Args:
        halves: Name in the file -> its "A" and "B".
        kinds: Name in the file -> "linear" or "embedding", as its tensors are called.
        config: Of the folder.
        folder: For errors.

    Raises:
        InputError: A half is missing or no matrix, or shapes and config disagree.
    """
    for module, pair in halves.items():
        _require_pair(module, pair, folder)
    parameters: dict[str, str] = {}
    if config.target_parameters or any(m.endswith(WRAPPED) for m in halves):
        shapes = {m: (pair["B"].shape[0], pair["A"].shape[-1]) for m, pair in halves.items()}
        parameters = parameter_names(
            list(halves), shapes, config.target_parameters, config.listed, str(folder / CONFIG)
        )
    promised = config.promised([parameters.get(m, m) for m in halves])
    found: dict[str, LoraFactors] = {}
    for module, pair in halves.items():
        key = parameters.get(module, module)
        rank, alpha = promised[key]
        if module in parameters:
            found |= experts_of(key, pair["A"], pair["B"], rank, config.scaling(alpha, rank), str(folder))
        else:
            found[module] = _factors(module, pair, kinds[module], promised[module], config, folder)
    return found


def _require_pair(module: str, pair: Mapping[str, Tensor], folder: Path) -> None:
    for half in ("A", "B"):
        if half not in pair:
            raise InputError(f"module {module!r} has no lora_{half}", where=str(folder))
        if not 2 <= pair[half].ndim <= 5 or not pair[half].is_floating_point():
            raise InputError(
                f"lora_{half} of {module!r} is {pair[half].dtype} {tuple(pair[half].shape)}, expected a floating matrix",
                where=str(folder),
            )


def _factors(
    module: str,
    pair: Mapping[str, Tensor],
    kind: str,
    promised: tuple[int, float],
    config: AdapterConfig,
    folder: Path,
) -> LoraFactors:
    A, B, stored = as_matrices(pair["A"], pair["B"], f"{folder}: {module}")
    kind = kind if stored == LINEAR else stored
    rank = A.shape[0]
    refuse_groups(A, B, stored, f"{folder}: {module}")
    if rank != B.shape[1]:
        raise InputError(
            f"module {module!r}: A {tuple(A.shape)} and B {tuple(B.shape)} have no rank in common", where=str(folder)
        )
    if rank != promised[0]:
        raise InputError(
            f"module {module!r} has factors of rank {rank}, and {CONFIG} says {promised[0]}",
            where=str(folder),
            hint="r, rank_pattern or target_parameters of the run that saved these weights?",
        )
    return LoraFactors(A, B, config.scaling(promised[1], rank), kind)


def naming(adapter: Adapter, fold: bool) -> Callable[[str, LoraFactors], dict[str, Tensor]]:
    """A function from a module and its factors to the file's tensors: none for an expert but the last of its weight.

    Args:
        adapter: Its names, kinds and ranks; the factors may be shapes on the meta device.
        fold: Whether scalings are multiplied into B.

    Raises:
        InputError: A fused weight lacks experts.
    """
    require_whole(adapter)
    waiting, names = Waiting(adapter.modules), stored_names(list(stacks_of(adapter.modules)))
    ranks = {p: max(f.rank for f in experts.values()) for p, experts in stacks_of(adapter.modules).items()}

    def named(module: str, f: LoraFactors) -> dict[str, Tensor]:
        f = f.folded(f.B.dtype, f.B.device) if fold else f
        if f.kind == EXPERT:
            whole = waiting.add(module, f)
            if whole is None:
                return {}
            module, pair = names[whole[0]], stacked(whole[1], ranks[whole[0]])
        else:
            pair = as_stored(f)
        keys = [ROOT + adapter.full_name(module) + s for s, (_, k) in SUFFIXES.items() if k == stored_as(f.kind)]
        return dict(zip(keys, pair, strict=True))

    return named
