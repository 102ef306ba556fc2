"""Weighted sums of LoRA files without torch: their pages mapped, added up module by module, and the written file read again."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plait.adapters.arrays import Array, NoArrayError
from plait.adapters.config import CONFIG
from plait.adapters.file_bytes import Mapped, begin_arrays
from plait.adapters.hashing import Digest, Hashing
from plait.adapters.lora import Adapter
from plait.adapters.naming import split_name
from plait.adapters.sealed import SEAL, SEALED
from plait.adapters.weights import WEIGHTS
from plait.border.records import to_json
from plait.disk import store
from plait.disk.hub import adapter_place
from plait.disk.overwriting import require_apart
from plait.disk.space import require_space
from plait.disk.written import Written, reused
from plait.formats.reading import with_one_prefix
from plait.formats.recognised import format_of, is_mlx
from plait.formats.single_file import begin_lora_file, stream_lora_file
from plait.formats.writing import finished, has_record
from plait.merging.kinship import with_kin
from plait.merging.light.of_folders import (
    largest_error,
    rounding_for,
    shapes_of,
    sum_of,
    sum_of_folders,
    sum_to,
    terms_of,
)
from plait.merging.light.sums import require_verified
from plait.merging.record import MergeRecord, input_hashes
from plait.merging.request import MergeRequest
from plait.merging.terms import Terms

# No number of a record takes more digits: what keeps the place of one that is not known yet.
_LONGEST = -2.2250738585072014e-308


def sum_of_files(request: MergeRequest) -> Written[MergeRecord] | None:
    """Answer a request of LoRA files without torch; None where that cannot be done, and nothing was written.

    No file is ever whole in memory: one pass adds up, one compares, both module by module.

    Raises:
        UsageError, InputError: As merging by torch raises them; the second also where an input was written meanwhile.
        RunError: What was written is not what was asked for.
    """
    start = time.perf_counter()
    request = replace(request, spec=request.spec.for_files())
    method = sum_of(request)
    if method is None or request.out is None or request.out.suffix != ".safetensors":
        return None
    places = [(name, adapter_place(path)) for name, path in map(split_name, request.folders)]
    if not all(_is_lora_file(path) for _, path in places):
        return None
    mapped = Mapped()
    try:
        adapters = _read(places, mapped)
        formats = {format_of(a) for a in adapters}
        if len({a.name for a in adapters}) < len(adapters) or len(formats) > 1:
            return None
        if request.format not in (None, *formats):
            return None
        require_apart(request.out, [str(path) for _, path in places])
        terms = terms_of(request, method, adapters)
        if terms.is_unchanged():
            return None
        written = _write(terms, request, request.out, formats.pop(), mapped)
    except NoArrayError:
        return None
    return written if written.reused else replace(written, seconds_merge=time.perf_counter() - start)


def sum_without_torch(request: MergeRequest) -> Written[MergeRecord] | None:
    """Answer a request of folders or of LoRA files without torch; see `sum_of_folders` and `sum_of_files`."""
    return sum_of_folders(request) or sum_of_files(request)


def _is_lora_file(path: Path) -> bool:
    """Whether it is a file that is no part of a folder of PEFT's or mlx-lm's."""
    of_folder = path.name == WEIGHTS and (path.parent / CONFIG).is_file()
    return path.suffix == ".safetensors" and path.is_file() and not of_folder and not is_mlx(path)


def _read(places: Sequence[tuple[str | None, Path]], mapped: Mapped) -> list[Adapter]:
    with Hashing() as hashing:
        begun = [begin_lora_file(path, hashing, name=name, begin=begin_arrays, mapped=mapped) for name, path in places]
        return with_one_prefix([rest() for rest in begun])


def _write(terms: Terms, request: MergeRequest, out: Path, format: str, mapped: Mapped) -> Written[MergeRecord]:
    took = rounding_for(request, terms)
    wanted = store.identity("merge", terms.settings(), input_hashes(terms.adapters), terms.seed)
    wanted["options"] |= {**took.identity, "format": format}
    if (before := finished(out, wanted, overwrite=request.overwrite)) is not None:
        return reused(out, before, MergeRecord)
    require_space(out, sum(a.nbytes for a in terms.adapters))
    shapes = shapes_of(terms, out.name.removesuffix(".safetensors"), took.dtype)
    record = terms.record(shapes.modules, dict.fromkeys(shapes.modules, 0.0))
    record = replace(with_kin(record, terms), format=format)
    errors: list[tuple[float, float]] = []

    def said(record: MergeRecord) -> Any:
        whole = {**wanted, "versions": store.versions(), "result": to_json(record)}
        return json.loads(json.dumps(whole, allow_nan=False))

    with store.staged_file(out, overwrite=request.overwrite, ours=has_record) as stage:
        stream_lora_file(
            stage,
            shapes,
            format,
            lambda put: sum_to(terms, put, took, mapped),
            said(replace(record, dtype=took.dtype, rounding_error=_LONGEST) if took.rounds else record),
            lambda: said(took.noted(record)),
            (lambda: errors.append(_verified(terms, stage, mapped))) if request.verify else None,
        )
        mapped.require_unchanged()
    error, seconds = errors[0] if errors else (None, None)
    return Written(replace(took.noted(record), verification_error=error), str(out), seconds_verify=seconds)


def _verified(terms: Terms, stage: Path, mapped: Mapped) -> tuple[float, float]:
    """Read what was written, one module at a time, and compare it with the inputs; the error, and the seconds that took."""
    start = time.perf_counter()
    written = begin_lora_file(stage, None, name="written", begin=_begin_unsealed, mapped=Mapped())().modules
    error = largest_error(terms, written, mapped)
    require_verified(error, terms.method.name)
    return error, time.perf_counter() - start


def _begin_unsealed(
    path: Path, hashing: Hashing | None, mapped: Mapped
) -> tuple[dict[str, Array], dict[str, str], Digest]:
    """Map a file whose digest is being worked out."""
    arrays, texts, digest = begin_arrays(path, hashing, mapped=mapped)
    return arrays, {name: text for name, text in texts.items() if name not in (SEAL, SEALED)}, digest
