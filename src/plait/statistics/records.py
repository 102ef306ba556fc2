"""What a statistics file's record may say: every count, shape and name checked before anything is computed from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.border.checked import Record
from plait.errors import InputError
from plait.statistics.moments import DENSE, FACTOR, ModuleInfo

GRADIENTS = "output_gradients/"  # before the names of a module's tensors that are of its output gradients
PARTS = ("total", "second", "residual", "tail", "padded_total")
LARGEST_RECORD = 16 << 20
LARGEST_WIDTH = 1 << 24  # no layer and no vocabulary has sixteen million rows
_HINT = "copy the file again, or collect the statistics anew"
_TEXTS = ("task", "base", "base_sha256", "revision", "backbone_prefix", "pool")


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """What the record says of one site.

    Args:
        count: Inputs that were added up.
        padded_count: Pads beside them.
        dim: Width.
        form: "dense" or "factor".
        error: Upper bound of what a sketch left out; 0 for none.
        step: Step to which a tail is rounded.
        sha256: Hash of its tensors; None in files of earlier versions.
    """

    count: int
    padded_count: int
    dim: int
    form: str
    error: float
    step: float
    sha256: str | None


@dataclass(frozen=True, slots=True)
class FileRecord:
    """The whole record: sites and output gradients as checked and as written, modules, provenance."""

    sites: Mapping[str, SiteRecord]
    raw_sites: Mapping[str, dict[str, Any]]
    modules: Mapping[str, ModuleInfo]
    provenance: dict[str, Any]
    gradients: Mapping[str, SiteRecord]
    raw_gradients: Mapping[str, dict[str, Any]]


def file_record(raw: Mapping[str, Any], tensors: Iterable[str], path: Path) -> FileRecord:
    """Check a parsed record, and compare it with the names of the tensors beside it.

    Raises:
        InputError: Names the key, what stands there and what should; or a tensor that belongs to no site and no module.
    """
    record = Record.of(raw, str(path), hint=_HINT)
    entries = dict(record.record("sites").records())
    sites = {name: site_record(entry) for name, entry in entries.items()}
    modules = {name: _module(entry) for name, entry in record.record("modules").records()}
    if odd := [n for n, i in modules.items() if i.site not in sites]:
        raise InputError(f"module {odd[0]!r} reads a site that is not in the file", where=str(path), hint=_HINT)
    measured = dict(record.record("output_gradients", optional=True).records())
    gradients = {name: site_record(entry) for name, entry in measured.items()}
    if odd := [n for n, g in gradients.items() if n not in modules or g.dim != modules[n].shape[0]]:
        raise InputError(f"output gradients of {odd[0]!r}, no module of that width", where=str(path), hint=_HINT)
    _require_parts([*sites, *(GRADIENTS + n for n in gradients)], set(tensors), path)
    provenance = record.record("provenance")
    for key in _TEXTS:
        if provenance.has(key):
            provenance.text(key)
    provenance.texts("tasks", ())
    raws, raw_gradients = ({name: dict(e.values) for name, e in those.items()} for those in (entries, measured))
    return FileRecord(sites, raws, modules, dict(provenance.values), gradients, raw_gradients)


def site_record(entry: Record) -> SiteRecord:
    """Check one site of a record."""
    return SiteRecord(
        count=entry.integer("count"),
        padded_count=entry.integer("padded_count"),
        dim=entry.integer("dim", 1, LARGEST_WIDTH),
        form=entry.text("form", choices=(DENSE, FACTOR)),
        error=entry.number("error", 0.0),
        step=entry.number("step", 0.0, default=0.0),
        sha256=entry.text("sha256") if entry.has("sha256") else None,
    )


def _module(entry: Record) -> ModuleInfo:
    out, width = entry.integers("shape", length=2, low=1, high=LARGEST_WIDTH)
    energy, fan = entry.number("output_energy"), entry.flag("fan_in_fan_out")
    return ModuleInfo(entry.text("site"), (out, width), energy, fan, entry.flag("is_router", False))


def _require_parts(sites: Iterable[str], tensors: set[str], path: Path) -> None:
    for site in sites:
        if missing := [p for p in ("total", "second") if f"{site}|{p}" not in tensors]:
            raise InputError(f"site {site!r} has no tensor {missing[0]!r}", where=str(path), hint=_HINT)
    if foreign := sorted(tensors - {f"{site}|{part}" for site in sites for part in PARTS}):
        raise InputError(f"tensor {foreign[0]!r} belongs to no site of the record", where=str(path), hint=_HINT)
