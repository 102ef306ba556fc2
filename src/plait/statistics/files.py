"""The statistics file: one safetensors file per task, with its record in the metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapters.memory import bytes_of
from plait.adapters.tensor_file import joined_tensors, write_tensors
from plait.adapters.tensors import read_metadata, read_tensors
from plait.border.checked import parsed_json, shown
from plait.disk.store import canonical_json, sha256_json, staged_file
from plait.errors import Damaged, InputError
from plait.statistics.moments import DENSE, Moments, Statistics, packed, unpacked
from plait.statistics.records import GRADIENTS, LARGEST_RECORD, PARTS, SiteRecord, file_record

# What is written: without output gradients as it always was, so that earlier versions read it.
SCHEMA, WITH_GRADIENTS = 1, 2
KIND = "plait.statistics"
HOLDS = "holds"  # what a file made of files remembers beside its identity: hashes that tell whose rows are in it


def write_statistics(
    path: str | Path, statistics: Statistics, *, identity: Mapping[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Write a statistics file, whole or not at all.

    A dense second moment is stored as its upper triangle, a factor rotated: no row of the data is in the file. That is
    less than the data, not anonymous: moments of few inputs tell much about them.

    Args:
        path: The file, usually ``<task>.stats.safetensors``.
        statistics: What to write.
        identity: What the file is to a pipeline (`plait.disk.store.identity`), and what it holds (`HOLDS`); read back by
            `read_identity`.
        overwrite: Replace a file that is there.
    """
    whole = (("", statistics.sites), (GRADIENTS, statistics.output_gradients))
    homes = _homes(whole)
    (sites, gradients), tensors = _entries(whole)
    record = {
        "schema": WITH_GRADIENTS if gradients else SCHEMA,
        "provenance": dict(statistics.provenance),
        "sites": sites,
        "modules": {
            n: {
                "site": i.site,
                "shape": list(i.shape),
                "output_energy": i.output_energy,
                "fan_in_fan_out": i.fan_in_fan_out,
                **({"is_router": True} if i.is_router else {}),
            }
            for n, i in statistics.modules.items()
        },
        **({"output_gradients": gradients} if gradients else {}),
    }
    if identity is not None:
        record["identity_sha256"] = sha256_json(dict(identity))
    text = json.dumps(record, allow_nan=False)
    metadata = {"kind": KIND, "statistics": text, "statistics_sha256": hashlib.sha256(text.encode()).hexdigest()}
    if identity is not None:
        metadata["identity"] = canonical_json(dict(identity))
    with staged_file(Path(path), overwrite=overwrite, ours=is_statistics) as stage:
        if homes is None:
            write_tensors(stage, tensors, metadata)
        else:
            joined_tensors(stage, {f"{name}|{part}": home for name, home in homes.items() for part in PARTS}, metadata)


def _homes(whole: Sequence[tuple[str, Mapping[str, Moments]]]) -> dict[str, Path] | None:
    """Name -> file, where all moments lie in files already and can be copied as bytes; else None."""
    found: dict[str, Path] = {}
    for prefix, those in whole:
        homes = getattr(those, "homes", None)
        if those and homes is None:
            return None
        found |= {prefix + name: path for name, (path, _) in (homes or {}).items()}
    return found or None


def _entries(
    whole: Sequence[tuple[str, Mapping[str, Moments]]],
) -> tuple[list[dict[str, dict[str, Any]]], dict[str, Tensor]]:
    """Records of sites and output gradients by name, and the tensors of those that are to be written from memory."""
    records: list[dict[str, dict[str, Any]]] = []
    tensors: dict[str, Tensor] = {}
    copied = _homes(whole) is not None
    for prefix, those in whole:
        entries = {n: dict(record) for n, (_, record) in getattr(those, "homes", {}).items()} if copied else {}
        for name, moments in () if copied else those.items():
            parts = _parts(moments)
            entries[name] = {**_site_record(moments), "sha256": content_hash(parts)}
            tensors |= {f"{prefix}{name}|{part}": tensor for part, tensor in parts.items()}
        records.append(entries)
    return records, tensors


def is_statistics(path: Path) -> bool:
    """Whether a safetensors file's metadata says that it holds statistics."""
    return read_metadata(path).get("kind") == KIND


def _parts(moments: Moments) -> dict[str, Tensor]:
    second = moments.second
    parts = {"total": moments.total, "second": packed(second) if moments.form == DENSE else second}
    if moments.residual is not None:
        parts["residual"] = moments.residual
    if moments.tail is not None:
        parts["tail"] = moments.tail
    if moments.padded_total is not None:
        parts["padded_total"] = moments.padded_total
    return parts


def content_hash(parts: Mapping[str, Tensor]) -> str:
    """SHA-256 of one site's tensors, so that a bit that flips on a disk or on the way to another team is found."""
    digest = hashlib.sha256()
    for part in PARTS:
        if part in parts:
            digest.update(f"{part}\0".encode())
            digest.update(bytes_of(parts[part].detach().cpu().contiguous()))
    return digest.hexdigest()


def _site_record(moments: Moments) -> dict[str, int | float | str]:
    return {
        "count": moments.count,
        "padded_count": moments.padded_count,
        "dim": moments.dim,
        "form": moments.form,
        "error": moments.error,
        "step": moments.step,
    }


def read_statistics(path: str | Path) -> Statistics:
    """Read a statistics file, checked.

    Raises:
        InputError: Not such a file, damaged, of another schema, or with tensors that do not fit its record.
    """
    path = Path(path)
    tensors, metadata, digest = read_tensors(path)
    record = file_record(record_of(metadata, path), tensors, path)
    sites = {site: moments_of(site, facts, tensors, path) for site, facts in record.sites.items()}
    gradients = {n: moments_of(GRADIENTS + n, facts, tensors, path) for n, facts in record.gradients.items()}
    return Statistics(sites, record.modules, record.provenance, digest, gradients)


def read_identity(path: str | Path) -> Mapping[str, object] | None:
    """Read the identity a file was written with, without reading its tensors; None where there is no file or identity.

    Raises:
        InputError: No whole statistics file.
        Damaged: Its identity is not the one that was written.
    """
    path = Path(path)
    if not path.is_file():
        return None
    metadata = read_metadata(path)
    text = metadata.get("identity")
    identity = None if text is None else parsed_json(text, str(path), "its identity", LARGEST_RECORD)
    written = record_of(metadata, path).get("identity_sha256")  # absent from files of earlier versions
    if written is not None and written != hashlib.sha256((text or "").encode()).hexdigest():  # its text is canonical
        raise Damaged("its identity is not the one that was written", where=str(path), hint="collect them again")
    return identity if isinstance(identity, dict) else None


def record_of(metadata: Mapping[str, str], path: Path) -> Mapping[str, object]:
    """Read the record in a file's metadata.

    Raises:
        InputError: No statistics, or of another schema.
    """
    if metadata.get("kind") != KIND:
        raise InputError("holds no statistics", where=str(path), hint="expected a file written by plait stats")
    text = metadata.get("statistics", "")
    if metadata.get("statistics_sha256", "") not in ("", hashlib.sha256(text.encode()).hexdigest()):
        raise InputError("its record is not the one that was written", where=str(path), hint="copy the file again")
    record = parsed_json(text, str(path), "its record", LARGEST_RECORD, hint="copy the file again")
    if not isinstance(record, dict):
        raise InputError("its record is not JSON", where=str(path), hint="copy the file again")
    if record.get("schema") not in (SCHEMA, WITH_GRADIENTS):
        raise InputError(
            f"statistics schema {shown(record.get('schema'))}, this plait reads {SCHEMA} and {WITH_GRADIENTS}",
            where=str(path),
            hint="collect them again with this version",
        )
    return record


def moments_of(site: str, record: SiteRecord, tensors: Mapping[str, Tensor], path: Path) -> Moments:
    """Make one site from its record and its tensors.

    Raises:
        InputError: They do not fit each other, or hold what is no finite number.
    """
    total, second = tensors[f"{site}|total"], tensors[f"{site}|second"]
    residual, padded = tensors.get(f"{site}|residual"), tensors.get(f"{site}|padded_total")
    dim, form, tail = record.dim, record.form, tensors.get(f"{site}|tail")
    _require_whole(site, record.sha256, tensors, path)
    wanted = (dim * (dim + 1) // 2,) if form == DENSE else (*second.shape[:1], dim)
    vectors = [v for v in (total, residual, padded) if v is not None]
    if tuple(second.shape) != wanted or any(tuple(v.shape) != (dim,) for v in vectors):
        raise InputError(f"site {site!r}: tensors do not fit width {dim}, form {form!r}", where=str(path))
    if tail is not None and (
        tail.dtype != torch.int8 or tuple(tail.shape) != (dim * (dim + 1) // 2,) or residual is None
    ):
        raise InputError(f"site {site!r}: its tail does not fit width {dim}", where=str(path))
    for part in (second, *vectors):
        if not part.is_floating_point() or not bool(part.isfinite().all()):
            raise InputError(f"site {site!r} holds NaN, infinity or integers", where=str(path))
    return Moments(
        count=record.count,
        total=total,
        second=unpacked(second, dim) if form == DENSE else second,
        form=form,
        residual=residual,
        error=record.error,
        tail=tail,
        step=record.step,
        padded_count=record.padded_count,
        padded_total=padded,
    )


def _require_whole(site: str, wanted: str | None, tensors: Mapping[str, Tensor], path: Path) -> None:
    parts = {part: tensors[f"{site}|{part}"] for part in PARTS if f"{site}|{part}" in tensors}
    if wanted is not None and wanted != content_hash(parts):
        raise InputError(
            f"site {site!r}: its tensors are not those that were written", where=str(path), hint="copy the file again"
        )
