"""Converting an adapter: another format, a plain LoRA, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from plait.adapters.arrays import require_left
from plait.adapters.carried import carried, lines, verify_carried
from plait.adapters.config import CONFIG
from plait.adapters.lineage import of_another_base
from plait.adapters.lora import Adapter, LoraFactors, concatenated
from plait.adapters.peft_format import read_adapter
from plait.adapters.tensors import all_finite
from plait.border.counts import agreed, plural
from plait.border.records import keyed, nested, to_json
from plait.disk import store
from plait.disk.hub import adapter_place, name_of
from plait.disk.overwriting import require_apart
from plait.disk.space import require_space
from plait.disk.written import Written, reused
from plait.errors import InputError, RunError, UsageError
from plait.formats.alpha import alpha_notes
from plait.formats.gguf_reading import read_gguf
from plait.formats.keys import DIFFUSERS, MLX, PEFT
from plait.formats.layouts import BY_BASE
from plait.formats.mlx import read_mlx
from plait.formats.plain import read_plain
from plait.formats.reading import format_of, read_any
from plait.formats.recognised import component_folders, is_mlx
from plait.formats.renaming import renamed
from plait.formats.single_file import read_lora_file
from plait.formats.work import Means, Step
from plait.formats.writing import FILE_FORMATS, checked_format, finished, in_format, joined, write_any
from plait.model.files import base_place
from plait.seeds import seed_of

_FAILED = 1e-6


@dataclass(frozen=True, slots=True)
class ConversionRecord:
    """Say what a conversion did.

    Args:
        to: Format that was written.
        base: Base of the adapter.
        modules: How many there are.
        origin: Format that was read.
        folded: How many had their scaling multiplied into B, because the format cannot express it.
        rounding_error: |D' - D| / |D| of a change of dtype over all modules; None without one.
        conversions: What was done to make it plain LoRA.
        notes: What should be known, a line each.
        verification_error: Difference of the written update from the one that was read, on random inputs.
    """

    to: str
    base: str
    modules: int
    origin: str = keyed("from")
    folded: int = 0
    rounding_error: float | None = None
    conversions: tuple[Step, ...] = nested(Step, ())
    notes: tuple[str, ...] = ()
    verification_error: float | None = None


def convert(
    source: Path,
    out: Path,
    *,
    to: str = PEFT,
    means: Means | None = None,
    component: str | None = None,
    dtype: str | None = None,
    layout: str = BY_BASE,
    rename: Sequence[str] = (),
    overwrite: bool = False,
) -> Written[ConversionRecord]:
    """Write an adapter in another format, its update unchanged, variants turned into plain LoRA.

    Args:
        source: A PEFT folder, a folder of them named by component (``unet``, ``text_encoder``), or a LoRA file; a folder
            of mlx-lm; a GGUF adapter (with the base in `means`).
        out: A folder for PEFT and mlx-lm, else a .safetensors file.
        to: "peft", "kohya", "diffusers" or "mlx".
        means: For variants, see `formats.plain`.
        component: What of a pipeline a single PEFT folder adapts, for kohya and diffusers.
        dtype: "float16", "bfloat16" or "float32" for all factors; by default as they are.
        layout: For kohya: "flux" or "sd3" fuse projections as those models' original layouts do, "diffusers" does not,
            "auto" goes by the base's name.
        rename: ``OLD=NEW`` each: other beginnings of module names, see `renaming.renamed`.
        overwrite: Replace what stands at `out`.

    Raises:
        InputError: What cannot be converted, with the reason.
        RunError: What was written is not what was read; it is not left behind.
    """
    target, means, source = checked_format(to), _found(means or Means()), adapter_place(source)
    adapter, steps, unread = _read(source, means, component, target)
    if rename:
        if target != PEFT or not (source / CONFIG).is_file():
            raise UsageError("--rename is for a PEFT folder that becomes one", hint="leave --rename or --to out")
        adapter = renamed(adapter, rename)
    require_apart(out, [source, *(p for p in (means.base, means.initial) if p is not None)])
    origin = "gguf" if source.suffix == ".gguf" else MLX if is_mlx(source) else PEFT
    origin = format_of(adapter) if source.is_file() and origin == PEFT else origin
    adapter = replace(adapter, source={**adapter.source, "format": adapter.source.get("format", PEFT)})
    ready = in_format(adapter, target, layout)
    rounding = None
    if dtype is not None:
        ready, rounding = _cast(ready, dtype)
    wanted = _identity(ready, target, means, component, dtype, rename)
    if (found := finished(out, wanted, overwrite=overwrite)) is not None:
        return reused(out, found, ConversionRecord)
    require_space(out, ready.nbytes)
    record = ConversionRecord(
        origin=origin,
        to=target,
        base=adapter.base,
        modules=len(ready.modules),
        folded=ready.source["folded"],
        rounding_error=rounding,
        conversions=tuple(steps),
        notes=(*_notes(ready, target), *unread, *(of_another_base(adapter.base, means.base) if means.base else ())),
    )
    result = to_json(record)

    def check(written: Path) -> None:
        result["verification_error"] = written_error(ready, written, target)
        if target == PEFT and not component_folders(written):
            verify_carried(carried([ready]), read_adapter(written, name="written"))

    write_any(out, ready, target, wanted, result, overwrite=overwrite, check=check)
    return Written(replace(record, verification_error=result["verification_error"]), str(out))


def _found(means: Means) -> Means:
    """The same, names on the hub as folders."""
    base = base_place(means.base) if means.base else None
    return replace(means, base=base, initial=adapter_place(means.initial) if means.initial else None)


def _read(
    source: Path, means: Means, component: str | None, target: str
) -> tuple[Adapter, Sequence[Step], Sequence[str]]:
    """The adapter, what was done to make it plain LoRA, and which of its factors PEFT would pass over."""
    if source.suffix == ".gguf" and source.is_file():
        if means.base is None:
            raise UsageError(f"which base does {source} adapt?", hint="--base DIR, which tells its names")
        return read_gguf(source, means.base), [], []
    if is_mlx(source):
        return read_mlx(source), [], []
    if source.is_file():
        if component:
            raise UsageError("--component is for a PEFT folder; a file names its components itself")
        return read_any(source), [], []
    parts = component_folders(source)
    if parts:
        read = {part: read_plain(folder, means, name=part) for part, folder in parts.items()}
        done = [replace(step, component=part) for part, p in read.items() for step in p.steps]
        unread = [line for p in read.values() for line in p.unread]
        return joined({part: p.adapter for part, p in read.items()}, name_of(source)), done, unread
    if not source.is_dir():
        raise InputError("no such adapter", where=str(source))
    plain = read_plain(source, means)
    if target in (PEFT, MLX):
        return plain.adapter, plain.steps, plain.unread
    if component is None:
        raise UsageError(
            f"which part of a pipeline does {source} adapt?", hint="--component unet, transformer, text_encoder, ..."
        )
    return joined({component: plain.adapter}, plain.adapter.name), plain.steps, plain.unread


def _identity(
    adapter: Adapter, target: str, means: Means, component: str | None, dtype: str | None, rename: Sequence[str]
) -> dict[str, Any]:
    options: dict[str, Any] = {"to": target, "rank": means.rank, "drop_bias": means.drop_bias}
    options |= {"component": component, "dtype": dtype, **({"rename": list(rename)} if rename else {})}
    if fused := adapter.source.get("fused"):
        options["layout"] = fused["layout"]
    inputs = {"adapter": str(adapter.source.get("sha256", ""))}
    for name, folder in (("base", means.base), ("initial", means.initial)):
        if folder is not None:
            files = sorted(p for p in folder.glob("*.safetensors"))
            inputs[name] = store.sha256_json({p.name: store.sha256_file(p) for p in files})
    return store.identity("convert", options, inputs)


_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def _cast(adapter: Adapter, dtype: str) -> tuple[Adapter, float]:
    """The adapter in another dtype, and |D' - D| / |D| over all modules."""
    if dtype not in _DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of {', '.join(_DTYPES)}")
    modules: dict[str, LoraFactors] = {}
    error = size = 0.0
    for module, f in adapter.modules.items():
        short = LoraFactors(f.A.to(_DTYPES[dtype]), f.B.to(_DTYPES[dtype]), f.scaling, f.kind)
        if not all_finite(short.A.float()) or not all_finite(short.B.float()):
            raise InputError(f"overflows {dtype}", where=module, hint="--dtype bfloat16 has float32's range")
        modules[module] = short
        error += concatenated([short, f], [1.0, -1.0], torch.float64).norm_squared()
        size += f.norm_squared()
    took = max(0.0, error / size) ** 0.5 if size > 0 else 0.0
    require_left(dtype, took, adapter.name)
    return replace(adapter, modules=modules), took


def _notes(adapter: Adapter, target: str) -> list[str]:
    found = []
    if target == DIFFUSERS:
        ranks: dict[str, set[int]] = {}
        for module, f in adapter.modules.items():
            ranks.setdefault(module.partition(".")[0], set()).add(f.rank)
        for part in [p for p, seen in ranks.items() if len(seen) > 1]:
            found.append(f"{part} has several ranks, which older diffusers scales wrongly in files without alphas")
    if fused := adapter.source.get("fused"):
        found.append(f"in the original layout of {fused['layout']}, whose projections are fused (--layout)")
        if fused["stacked"]:
            found.append(
                f"{plural(fused['stacked'], 'fused layer', 'adds up its', 'add up their')} parts' ranks: each part had an A of its own"
            )
        if fused["absent"]:
            found.append(
                f"{plural(fused['absent'], 'part')} of fused layers {agreed(fused['absent'], 'was', 'were')} not adapted: the rows are 0"
            )
    found += lines(carried([adapter]))
    if adapter.source.get("tucker"):
        found.append(
            f"{plural(adapter.source['tucker'], 'convolution')} came with a middle (Tucker) factor: multiplied into A"
        )
    return found + alpha_notes(adapter.source)


def written_error(ready: Adapter, out: Path, target: str) -> float:
    """The largest relative difference of any module's update on random inputs, written against read."""
    written = read_back(out, target)
    worst = 0.0
    if written.keys() != {ready.full_name(m) for m in ready.modules}:
        raise RunError("what was written holds other modules", where=str(out), hint="please report this")
    for module, f in ready.modules.items():
        generator = torch.Generator().manual_seed(seed_of("convert", module))
        probe = torch.randn(f.shape[1], 2, dtype=torch.float64, generator=generator)
        mine, theirs = f.folded(torch.float64), written[ready.full_name(module)].folded(torch.float64)
        right, found = mine.B @ (mine.A @ probe), theirs.B @ (theirs.A @ probe)
        worst = max(worst, float((found - right).norm() / right.norm().clamp(min=1e-300)))
    if worst > _FAILED:
        raise RunError(f"the written update differs by {worst:.2g}", where=str(out), hint="please report this")
    return worst


def read_back(out: Path, target: str) -> dict[str, LoraFactors]:
    """Module, named as `in_format` names them -> the factors that stand on disk."""
    if target in FILE_FORMATS:
        return dict(read_lora_file(out, name="written").modules)
    if target == MLX:
        return dict(read_mlx(out, name="written").modules)
    parts = component_folders(out)
    if not parts:
        adapter = read_adapter(out, name="written")
        return {adapter.full_name(m): f for m, f in adapter.modules.items()}
    read = {part: read_adapter(folder, name="written") for part, folder in parts.items()}
    return {f"{part}.{a.full_name(m)}": f for part, a in read.items() for m, f in a.modules.items()}
