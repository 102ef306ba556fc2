"""Writing an adapter in any format: its modules renamed, split into PEFT's one folder per component where need be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from plait.adapters.file_bytes import read_layout
from plait.adapters.lora import EXPERT, Adapter, LoraFactors
from plait.adapters.peft_format import write_adapter
from plait.adapters.sealed import sealed_texts
from plait.disk import store
from plait.disk.manifest import require_wanted
from plait.disk.overwriting import require_replaceable, require_replaceable_file
from plait.errors import InputError, UsageError
from plait.formats.fused import Layout, put_together, taken_apart
from plait.formats.keys import DIFFUSERS, FORMATS, KOHYA, MLX, ORIGINAL, PEFT
from plait.formats.layouts import BY_BASE, dotted_to_kohya, layout_for, original_layout, require_known
from plait.formats.mlx import write_mlx
from plait.formats.names import COMPONENTS, diffusers_names, kohya_names
from plait.formats.recognised import file_record, format_of
from plait.formats.single_file import unscaled, write_lora_file

FILE_FORMATS = (KOHYA, DIFFUSERS, ORIGINAL)


def checked_format(name: str) -> str:
    """A format's name.

    Raises:
        UsageError: Not one of them.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}", hint=f"one of {', '.join(FORMATS)}")
    return name


def in_format(adapter: Adapter, target: str, layout: str = BY_BASE) -> Adapter:
    """The adapter as a format can hold it: modules named its way, and scalings that it cannot express folded into B.

    kohya's alphas express any scaling, PEFT's whole alphas, diffusers' files (which have none) only 1. Transformers whose
    original layout fuses projections (Flux, Stable Diffusion 3) come apart on the way out of kohya's format and together
    on the way into it.

    Args:
        adapter: Read from any format.
        target: The format.
        layout: On the way into kohya's format, see `layouts.layout_for`.

    Raises:
        InputError: Names that cannot be turned.
        UsageError: A layout where none is changed.
    """
    origin = format_of(adapter)
    if target == ORIGINAL != origin:
        raise UsageError(
            "only merges of files with such names are written with them", hint="--to kohya has the same layout"
        )
    if layout != BY_BASE and (target != KOHYA or origin in (KOHYA, ORIGINAL)):
        raise UsageError("a layout is chosen on the way from PEFT or diffusers to kohya", hint="leave --layout out")
    facts: dict[str, Any]
    if origin == target:
        modules = {m: _scaled_for(f, target) for m, f in adapter.modules.items()}
        source = {**adapter.source, "folded": _folded(modules, adapter.modules)}
        return replace(adapter, modules=modules, source=source)
    if any(f.kind == EXPERT for f in adapter.modules.values()):
        raise InputError(
            f"adapts fused experts, for which {target} has no names",
            where=adapter.name,
            hint="keep it as a PEFT folder",
        )
    if {origin, target} == {PEFT, MLX}:  # the same names
        return _of_language_model(adapter, target)
    if MLX in (origin, target):
        raise InputError(f"{MLX} is for language models, and {origin} files are not", where=adapter.name)
    if target == KOHYA and origin == ORIGINAL:  # the same layout: whole layers only change their names
        kohya = dotted_to_kohya(adapter.modules)
        if original_layout(kohya.values()):
            _named_by_diffusers(adapter, origin)  # refuses what the layout has not
        modules, facts = {kohya[m]: f for m, f in adapter.modules.items()}, {"folded": 0}
    else:
        named = _named_by_diffusers(adapter, origin)
        modules = {m: _scaled_for(f, target) for m, f in named.items()}
        facts = {"folded": _folded(modules, named)}
        if target == KOHYA:
            modules, more = _named_by_kohya(modules, layout_for(adapter.base, layout))
            facts |= more
    return replace(
        adapter,
        modules=dict(sorted(modules.items())),
        prefix="",
        target_modules=None,
        source={
            **adapter.source,
            **facts,
            "format": target,
            "layouts": adapter.source.get("layouts", {}) if target == DIFFUSERS else {},
            "pipeline": True,
        },
    )


def _of_language_model(adapter: Adapter, target: str) -> Adapter:
    """The adapter with the names of the whole model, for PEFT's folders and mlx-lm's."""
    modules = {adapter.full_name(m): f for m, f in adapter.modules.items()}
    if target == MLX and len({f.scaling for f in modules.values()}) > 1:
        scaled = {m: unscaled(f) for m, f in modules.items()}
    else:
        scaled = {m: _scaled_for(f, PEFT) for m, f in modules.items()} if target == PEFT else modules
    source = {**adapter.source, "format": target, "folded": _folded(scaled, modules)}
    return replace(adapter, modules=dict(sorted(scaled.items())), prefix="", target_modules=None, source=source)


def _named_by_diffusers(adapter: Adapter, origin: str) -> dict[str, LoraFactors]:
    """An adapter's modules as diffusers names and separates them."""
    whole = dict(adapter.modules)
    if origin == ORIGINAL:
        kohya = dotted_to_kohya(whole)
        whole = {kohya[m]: f for m, f in whole.items()}
    if origin in (KOHYA, ORIGINAL):
        original = original_layout(whole)
        if origin == ORIGINAL and original is None:
            raise InputError(
                f"module {next(iter(adapter.modules))!r} is of a model whose names in diffusers are not known here",
                hint="--to kohya keeps its names; merge and write it in the format it has",
            )
        if original:
            require_known(adapter.base)
            whole = taken_apart(whole, original)
        names = diffusers_names(whole)
        names = {m: original.encoder_out(n) for m, n in names.items()} if original else names
    else:
        names = {m: m if origin == DIFFUSERS else adapter.full_name(m) for m in whole}
    return {names[m]: f for m, f in whole.items()}


def _folded(found: Mapping[str, LoraFactors], before: Mapping[str, LoraFactors]) -> int:
    return sum(found[m].scaling != f.scaling for m, f in before.items())


def _named_by_kohya(
    modules: Mapping[str, LoraFactors], layout: Layout | None
) -> tuple[dict[str, LoraFactors], dict[str, Any]]:
    """Modules named as diffusers has them under kohya's names, fused where the layout fuses; and facts for the record."""
    if layout is None:
        kohya = kohya_names(modules)
        return {kohya[m]: f for m, f in modules.items()}, {"fused": None}
    fused, counts = put_together(modules, layout)
    encoders = {m: layout.encoder_in(m) for m in fused if m in modules}
    kohya = kohya_names(encoders.values(), several=True)
    named = {kohya[encoders[m]] if m in encoders else m: f for m, f in fused.items()}
    return named, {"fused": {"layout": layout.name, **counts}}


def _scaled_for(factors: LoraFactors, target: str) -> LoraFactors:
    alpha = factors.scaling * factors.rank
    whole = alpha > 0.5 and abs(round(alpha) - alpha) < 1e-9 * alpha
    return factors if target == KOHYA or (target == PEFT and whole) else unscaled(factors)


def finished(out: Path, wanted: Mapping[str, Any], *, overwrite: bool) -> Mapping[str, Any] | None:
    """The record of what already stands at `out` where it is the wanted result, else None.

    Raises:
        UsageError: Something else stands there.
        Damaged: It was written by plait, and changed since.
    """
    if overwrite or not (out.exists() or out.is_symlink()):
        if out.suffix == ".safetensors":
            require_replaceable_file(out, has_record)
        else:
            require_replaceable(out)
        return None
    if not out.is_file():
        return (store.read_manifest(out) or {}) if store.is_done(out, wanted) else None
    record = file_record(sealed_texts(out), out)
    if record is None:
        raise UsageError("exists and was not written by plait", where=str(out), hint="another --out, or --overwrite")
    require_wanted(out, record, wanted)
    return record


def has_record(path: Path) -> bool:
    """Whether plait wrote a file."""
    return file_record(read_layout(path)[0], path) is not None


def write_any(
    out: Path,
    adapter: Adapter,
    target: str,
    wanted: Mapping[str, Any],
    result: dict[str, Any],
    *,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write an adapter whose modules `in_format` named, whole or not at all.

    Args:
        out: A .safetensors file for kohya and diffusers; a folder for PEFT. An adapter of a pipeline's components becomes
            one PEFT folder per component inside it (``out/unet``, ``out/text_encoder``), since PEFT adapts one model.
        adapter: As `in_format` gave it.
        target: The format.
        wanted: The identity of the result.
        result: What goes into its record.
        overwrite: Replace what stands at `out`.
        check: Looks at what was written before it takes its place, and raises where it must not.

    Raises:
        UsageError: A file where a folder is due, or the other way round.
    """
    is_file = out.suffix == ".safetensors"
    if is_file != (target in FILE_FORMATS):
        due = "a .safetensors file" if target in FILE_FORMATS else "a folder"
        raise UsageError(f"{target} is written as {due}", where=str(out), hint="--out, or another format")
    if is_file:
        record = json.loads(json.dumps({**wanted, "versions": store.versions(), "result": result}, allow_nan=False))
        with store.staged_file(out, overwrite=overwrite, ours=has_record) as stage:
            write_lora_file(stage, adapter, target, record)
            if check:
                check(stage)
        return
    with store.staged_folder(out, wanted, overwrite=overwrite, result=result) as stage:
        parts = components(adapter)
        for component, part in parts.items():
            inside = stage / component if component else stage
            inside.mkdir(exist_ok=True)
            (write_mlx if target == MLX else write_adapter)(inside, part)
        if check:
            check(stage)


def components(adapter: Adapter) -> dict[str, Adapter]:
    """Component of a pipeline -> its own adapter; one without a name where the adapter is of a single model.

    Raises:
        InputError: A module of no component.
    """
    if format_of(adapter) not in FILE_FORMATS and not adapter.source.get("pipeline"):
        return {"": adapter}
    found: dict[str, Adapter] = {}
    if lost := [m for m in adapter.modules if m.partition(".")[0] not in _PARTS]:
        known = ", ".join(sorted(_PARTS))
        raise InputError(
            f"module {lost[0]!r} belongs to none of {known}", hint="merge and write it in the format it has"
        )
    for part in sorted({m.partition(".")[0] for m in adapter.modules}):
        inside = {m.partition(".")[2]: f for m, f in adapter.modules.items() if m.startswith(f"{part}.")}
        found[part] = replace(adapter, modules=inside, prefix="")
    return found


_PARTS = {*COMPONENTS.values()}


def joined(parts: Mapping[str, Adapter], name: str) -> Adapter:
    """The adapters of a pipeline's components as one, modules named as diffusers has them.

    Raises:
        InputError: An unknown component, or heads and whole weights, which no single file holds.
    """
    if unknown := sorted(set(parts) - _PARTS):
        raise InputError(f"{unknown[0]!r} is no component", hint=f"one of {', '.join(sorted(_PARTS))}")
    modules = {f"{part}.{a.full_name(m)}": f for part, a in parts.items() for m, f in a.modules.items()}
    for part, adapter in parts.items():
        if beside := [*adapter.heads, *adapter.extras, *adapter.copies]:
            raise InputError(
                f"holds heads or whole weights beside the factors ({beside[0]!r})",
                where=part,
                hint="single files hold LoRA factors only; plait convert --base DIR --to peft makes an embedding's weights factors",
            )
    first = next(iter(parts.values()))
    digests = {part: str(a.source.get("sha256", "")) for part, a in parts.items()}
    source: dict[str, Any] = {
        "format": DIFFUSERS,
        "layouts": {},
        "sha256": store.sha256_json(digests),
        "path": first.source.get("path"),
    }
    return Adapter(name, first.base, dict(sorted(modules.items())), source=source)
