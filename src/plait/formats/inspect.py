"""What an adapter is: format, base, ranks, alphas, modules, variant, and what plait can do with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.adapters.beside import undeclared
from plait.adapters.config import CONFIG, read_raw_config
from plait.adapters.experts import member_of
from plait.adapters.lineage import base_adapter
from plait.adapters.lora import EXPERT, Adapter
from plait.adapters.places import folders_inside
from plait.adapters.shapes import Shape, read_shapes, weight_shapes
from plait.border.checked import Record
from plait.border.records import inline, optional
from plait.disk.files import nearby
from plait.disk.hub import adapter_place, hub_facts, name_of
from plait.disk.manifest import MANIFEST, read_manifest
from plait.errors import InputError
from plait.formats.first_look import attempt, squares_of
from plait.formats.keys import MLX, PEFT, TUCKER, variant_of
from plait.formats.recognised import MLX_FILE, component_folders, file_record, format_of, is_mlx

# What a config or the names of tensors give away -> its name, and the way to a plain LoRA, if there is one.
_BASE, _START = "plait convert --base DIR", "plait convert --initial DIR"
_VARIANTS = {
    "use_dora": ("DoRA", _BASE),
    "lora_bias": ("lora_bias", "plait convert, where its biases are zero; --drop-bias leaves them out"),
    "trainable_token_indices": ("trained tokens", _BASE),
    "alora_invocation_tokens": ("aLoRA", None),
    "use_qalora": ("QALoRA", None),
    "use_bdlora": ("BD-LoRA", None),
    "kasa_config": ("KaSA", None),
    "monteclora_config": ("MonteCLoRA", None),
    "arrow_config": ("Arrow", None),
    "layer_replication": ("layer replication", None),
}
_STARTS = {"pissa": _START, "olora": _START, "corda": _START, "lora_ga": _START, "mica": _START, "loftq": None}


@dataclass(frozen=True, slots=True)
class Figures:
    """What can be counted in an adapter that is read as plain LoRA.

    Args:
        modules: How many there are.
        module_kinds, targets, ranks, alphas: Value -> how many modules have it.
        without_alpha, alpha_from: How many modules came without an alpha, and where the alphas of the others come from.
        heads: Tasks that have one.
        extras, modules_to_save: Weights that were trained whole, and what the config says of them.
        copies: The base's own weights beside the factors.
        update_norm: Frobenius norm of all deltas together; None where no numbers were read.
        zero_modules: How many deltas are zero; None where no numbers were read.
    """

    modules: int
    module_kinds: Mapping[str, int]
    targets: Mapping[str, int]
    ranks: Mapping[str, int]
    alphas: Mapping[str, int]
    without_alpha: int
    alpha_from: tuple[str, ...]
    heads: tuple[str, ...]
    extras: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    copies: tuple[str, ...]
    update_norm: float | None
    zero_modules: int | None


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What an adapter is.

    Args:
        format, name, base, task_type: As its files say.
        variant: LoRA, or what it is instead.
        dtypes, parameters, size_mb: Types of its tensors, how many numbers they hold, and their size.
        stacked_on: The adapter or baked model that it was trained on.
        merged_from, method: Of a merge, the adapters and the method.
        problem: Why it cannot be read as a plain LoRA; None where it can.
        can: What plait can do with it.
        figures: What can be counted; None with a problem.
        hub: Its name and commit on the hub, where it came from there.
    """

    format: str | None
    name: str
    base: str | None
    task_type: str | None
    variant: str
    dtypes: tuple[str, ...]
    parameters: int
    size_mb: float
    stacked_on: str | None
    merged_from: tuple[str, ...] | None
    method: str | None
    problem: str | None
    can: tuple[str, ...]
    figures: Figures | None = inline(Figures)
    hub: Mapping[str, Any] = inline()


@dataclass(frozen=True, slots=True)
class Inspection:
    """One adapter: where it is, what it is, and which adapters lie in folders of it."""

    path: str
    facts: AdapterFacts = inline(AdapterFacts)
    inside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Inspections:
    """A folder of adapters: by the component of a pipeline that each adapts, or by their folders."""

    path: str
    format: str
    components: Mapping[str, AdapterFacts] | None = optional()
    adapters: Mapping[str, AdapterFacts] | None = optional()


def inspect(path: Path, *, full: bool = False) -> Inspection | Inspections:
    """Say what can be said about an adapter without its base.

    Of a PEFT folder larger than `first_look.READ_WHOLE` the headers alone are read: everything is told but the length of the update and
    which modules are zero, and NaN, or bytes that are not what its manifest says, are not looked for.

    Args:
        path: A PEFT folder, a folder of them named by component, or a LoRA file.
        full: Whether to read the numbers of large folders too, a module at a time.

    Raises:
        InputError: Nothing there, or neither a folder of adapters nor a safetensors file.
        Damaged: A folder of plait's that is not what its manifest says.
    """
    path = adapter_place(path)
    if parts := component_folders(path):
        return Inspections(str(path), PEFT, components={part: _facts(folder, full) for part, folder in parts.items()})
    if not path.exists():
        raise InputError("no such file or folder", where=str(path), hint=nearby(path))
    within = folders_inside(path)
    if within and not (path / CONFIG).exists():
        return Inspections(str(path), PEFT, adapters={str(p.relative_to(path)): _facts(p, full) for p in within})
    return Inspection(str(path), _facts(path, full), tuple(str(p) for p in within))


def _facts(path: Path, full: bool) -> AdapterFacts:
    if path.is_dir() and not (path / CONFIG).exists():
        raise InputError(f"no {CONFIG}, and no folders with one", where=str(path), hint="expected an adapter")
    path = path.parent if path.is_file() and is_mlx(path) else path
    mlx = is_mlx(path)
    tensors, metadata = _tensors(path / MLX_FILE if mlx else path)
    variant, way = _variant(path, tensors)
    nbytes = sum(t.nbytes for t in tensors.values())
    adapter, problem = attempt(path, nbytes, full=full)
    manifest = read_manifest(path) if path.is_dir() and (path / MANIFEST).exists() else None
    record = file_record(metadata, path) if path.is_file() else manifest
    config = _config(path) if path.is_dir() else {}
    below = base_adapter(path) if path.is_dir() else None
    result = Record.of(record or {}, str(path)).record("result", optional=True)
    return AdapterFacts(
        format=format_of(adapter) if adapter else (MLX if mlx else PEFT if path.is_dir() else None),
        name=adapter.name if adapter else name_of(path).removesuffix(".safetensors"),
        base=(adapter.base if adapter else config.get("base_model_name_or_path")) or None,
        task_type=adapter.task_type if adapter else config.get("task_type"),
        variant=variant,
        dtypes=tuple(sorted({t.dtype.name for t in tensors.values()})),
        parameters=sum(t.numel() for t in tensors.values()),
        size_mb=nbytes / 1e6,
        stacked_on=str(below) if below else None,
        merged_from=tuple(result.texts("tasks")) if result.has("tasks") else None,
        method=result.text("method") if result.has("method") else None,
        problem=problem,
        can=tuple(_can(adapter, path, way, below is not None, result.values)),
        figures=_figures(adapter) if adapter else None,
        hub=hub_facts(path),
    )


def _tensors(path: Path) -> tuple[Mapping[str, Shape], Mapping[str, str]]:
    """The tensors without their numbers, and the metadata."""
    return read_shapes(path) if path.is_file() else weight_shapes(path)


def _config(folder: Path) -> Mapping[str, Any]:
    return read_raw_config(folder)


def _variant(path: Path, tensors: Mapping[str, Any]) -> tuple[str, str | None]:
    """The variant's name, and the way from it to a plain LoRA; None where there is none or it needs none."""
    if path.is_file():
        found = variant_of(tensors)
        tucker = any(f".{TUCKER}" in key for key in tensors)
        return (found[0], None) if found else ("LoRA with Tucker convolutions" if tucker else "LoRA", None)
    raw = _config(path)
    if is_mlx(path):
        kind = str(raw.get("fine_tune_type", "lora"))
        return {"lora": "LoRA", "dora": "DoRA", "full": "a full fine-tune"}.get(kind, kind), None
    for key, (name, way) in _VARIANTS.items():
        if raw.get(key):
            return name, way
    init = str(raw.get("init_lora_weights", True)).lower()
    for start, way in _STARTS.items():
        if init.startswith(start):
            return f"LoRA started by {init}", way
    return ("rsLoRA" if raw.get("use_rslora") else "LoRA"), None


def _figures(adapter: Adapter) -> Figures:
    alphas = Counter(round(f.scaling * f.rank, 6) for f in adapter.modules.values())
    squares = squares_of(adapter)
    return Figures(
        modules=len(adapter.modules),
        module_kinds=dict(sorted(Counter(f.kind for f in adapter.modules.values()).items())),
        targets=dict(sorted(Counter(_target(m) for m in adapter.modules).items())),
        ranks={str(k): v for k, v in sorted(Counter(f.rank for f in adapter.modules.values()).items())},
        alphas={f"{k:g}": v for k, v in sorted(alphas.items())},
        without_alpha=adapter.source.get("without_alpha", 0),
        alpha_from=tuple(adapter.source.get("alpha_from", [])),
        heads=tuple(sorted(adapter.heads)),
        extras=tuple(sorted(adapter.extras)),
        modules_to_save=tuple(adapter.modules_to_save),
        copies=tuple(sorted(adapter.copies)),
        update_norm=None if squares is None else sum(squares) ** 0.5,
        zero_modules=None if squares is None else squares.count(0.0),
    )


def _target(module: str) -> str:
    """A module's last word: what target_modules would call it; kohya's names have no dots to tell words by."""
    if member := member_of(module):
        return member[0].rpartition(".")[2]
    return module.rpartition(".")[2] if "." in module else "_".join(module.split("_")[:2])


def _can(adapter: Adapter | None, path: Path, way: str | None, stacked: bool, result: Mapping[str, Any]) -> list[str]:
    if adapter is None:
        return [f"become a plain LoRA: {way}"] if way else []
    found = []
    if not undeclared(adapter.extras, adapter.modules_to_save):  # else merging would write over the base's
        found.append("merge with adapters of the same base and format (plait merge)")
    if not any(f.kind == EXPERT for f in adapter.modules.values()):
        found.append("convert to another format (plait convert)")
    if path.is_dir() and not adapter.extras:
        found.append("bake into its base (plait merge --bake)")
    if adapter.extras:
        found.append(f"become a plain LoRA: {_BASE}")
    if stacked:
        found.append("compose with the adapter it was trained on (plait merge --stack)")
    if result.get("adapters"):
        found.append("gain or lose an adapter (plait edit)")
    return found
