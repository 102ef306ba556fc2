"""What a folder of plait's says about itself: `plait.json`, and whether the folder is still what it says.

The manifest lists every file with its size and its SHA-256, and carries a digest of its own content. One function,
`compare_with_manifest`, holds a folder against it, for all who read one: readers, `store.is_done` and `plait check`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from plait.border.checked import LARGEST_MANIFEST
from plait.border.counts import plural
from plait.disk.files import read_json, sha256_file, sha256_json
from plait.disk.locks import require_readable
from plait.errors import Damaged, InputError, UsageError

SCHEMA = 1
MANIFEST = "plait.json"
CARD = "README.md"  # the one file that is not listed, so that a card may be edited
_SIZES, _SEAL = "sizes", "manifest_sha256"
LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt")  # what people lay beside a result that they publish
CARD_HASH = "card"  # key of its SHA-256 as it was written, by which an edited one is known
_VOLATILE = {"versions", "result", "files", CARD_HASH, _SIZES, _SEAL}
_OBJECTS = ("options", "inputs", "result", "files", _SIZES)
_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_FOLDERS_ABOVE = 2  # folders between a result and an adapter inside it: out/unet, out/steps/000100
_ADVICE = f"damaged or edited since it was written; remove {MANIFEST} if that was on purpose"


@dataclass(frozen=True, slots=True)
class Fault:
    """One difference between a folder and its manifest.

    Args:
        file: The file at fault, as a path inside the folder with "/".
        what: What is wrong with it, as the end of a sentence that starts with its name.
    """

    file: str
    what: str


def sealed(record: Mapping[str, Any], files: Mapping[str, tuple[int, str]]) -> Mapping[str, Any]:
    """Complete a manifest: a record, the files of its folder, and the digest of all that.

    Args:
        record: Everything else that the manifest says.
        files: File, as a path inside the folder -> its size in bytes and its SHA-256.
    """
    fields = {k: v for k, v in record.items() if k not in ("files", _SIZES, _SEAL)}
    content: dict[str, Any] = json.loads(json.dumps(fields, allow_nan=False))  # keys and tuples as they will be read
    content["files"] = {name: digest for name, (_, digest) in files.items()}
    content[_SIZES] = {name: size for name, (size, _) in files.items()}
    return {**content, _SEAL: sha256_json(content)}


def read_manifest(path: Path) -> Mapping[str, Any] | None:
    """Read the manifest of a finished folder, or None where there is none.

    Manifests of earlier versions, which hold neither sizes nor a digest of their own, are read as they are; one that
    holds either must hold both.

    Raises:
        Damaged: No manifest of plait's, or not the one that was written.
        InputError: One of another schema, or in a folder that may not be entered.
    """
    require_readable(path)
    file = path / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = read_json(file, limit=LARGEST_MANIFEST)
    except InputError as e:
        raise Damaged(e.what, where=e.where, hint=e.hint) from None
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise Damaged("not a plait manifest", where=str(file))
    if _SEAL in manifest or _SIZES in manifest:
        _require_seal(manifest, file)
    if manifest["schema"] != SCHEMA:
        raise InputError(
            f"manifest schema {manifest['schema']}, this plait reads {SCHEMA}",
            where=str(file),
            hint="redo it with this version",
        )
    if any(not isinstance(manifest.get(key, {}), dict) for key in _OBJECTS) or not _lists_files(manifest):
        raise Damaged("not a plait manifest", where=str(file))
    return manifest


def _require_seal(manifest: Mapping[str, Any], file: Path) -> None:
    content = {k: v for k, v in manifest.items() if k != _SEAL}
    try:
        same = sha256_json(content) == manifest.get(_SEAL)
    except ValueError:  # NaN or infinity, which no manifest is written with
        same = False
    if not same:
        raise Damaged("not the manifest that was written: its digest is another", where=str(file), hint=_ADVICE)


def _lists_files(manifest: Mapping[str, Any]) -> bool:
    """Whether `files` maps paths inside the folder to hashes, and `sizes`, where it is, the same paths to sizes."""
    files, sizes = manifest.get("files", {}), manifest.get(_SIZES)
    inside = all(_is_inside(name) and isinstance(d, str) and _SHA256.fullmatch(d) for name, d in files.items())
    counted = sizes is None or (sizes.keys() == files.keys() and all(type(n) is int and n >= 0 for n in sizes.values()))
    return inside and counted


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not PurePosixPath(name).is_absolute() and ".." not in parts and "\0" not in name


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Dotted keys in which two manifests differ, as "key: found -> wanted"; of inputs, which are hashes, that they are others.

    >>> differences({"options": {"rank": 8}}, {"options": {"rank": 4, "seed": 0}})
    ['options.rank: 8 -> 4', 'options.seed: not recorded -> 0']
    >>> differences(
    ...     {"options": {"options": {"density": 0.2}}}, {"options": {"options": {"density": 0.3}}}
    ... )  # of a method
    ['options.density: 0.2 -> 0.3']
    >>> differences({"options": {"bits": None, "rank": 8}}, {"options": {"rslora": True, "rank": ["a", "b"]}})
    ['options.bits: none -> not asked for', 'options.rank: 8 -> a, b', 'options.rslora: not recorded -> yes']
    >>> differences(
    ...     {"inputs": {"texts:sst2": "0a", "adapter:a": "1b"}}, {"inputs": {"texts:sst2": "0c", "general": "2d"}}
    ... )
    ['inputs.adapter:a: left out', 'inputs.general: new', 'inputs.texts:sst2: another']
    """
    a, b = dict(_flat(found)), dict(_flat(wanted))
    differing = [k for k in sorted({*a, *b}) if (k in a, a.get(k)) != (k in b, b.get(k))]
    return [f"{'.'.join(key for key, _ in groupby(k))}: {_difference(k, a, b)}" for k in differing]


def _difference(
    key: tuple[str, ...], found: Mapping[tuple[str, ...], Any], wanted: Mapping[tuple[str, ...], Any]
) -> str:
    if key[0] == "inputs" and len(key) > 1:
        return "new" if key not in found else "another" if key in wanted else "left out"
    before = _spoken(found[key]) if key in found else "not recorded"
    return f"{before} -> {_spoken(wanted[key]) if key in wanted else 'not asked for'}"


def _spoken(value: Any) -> str:
    """A value of a manifest as a person would say it."""
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_spoken, value)) if isinstance(value, list | tuple) else str(value)


def require_wanted(path: Path, found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """Refuse a result that was made otherwise than it is wanted now.

    Args:
        path: Where it stands.
        found: Its manifest or identity; None where it has none.
        wanted: The identity of the result that is asked for.

    Raises:
        UsageError: The two differ; says in what.
    """
    differing = ["it does not say what it was made from"] if found is None else differences(found, wanted)
    if differing:
        more = [f"and {len(differing) - 6} more"] if len(differing) > 6 else []
        raise UsageError(
            f"exists with other settings: {'; '.join([*differing[:6], *more])}",
            where=str(path),
            hint="choose another --out, or --overwrite",
        )


def _flat(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            if path or key not in _VOLATILE:
                yield from _flat(inner, (*path, str(key)))
    else:
        yield path, value


# --- a folder against its manifest ------------------------------------------------------------------------------------


def compare_with_manifest(folder: Path, *, read: bool, known: Mapping[str, str] | None = None) -> tuple[Fault, ...]:
    """Hold a folder against its manifest: every file it lists, every file that lies there, and the manifest itself.

    A folder inside a result (a component's adapter, an intermediate one) is held against the result's manifest, as far
    as that speaks of it. Not looked at: README.md, a licence, and names that start with a dot, which version control, hubs and
    file managers leave and no reader opens.

    Args:
        folder: The folder.
        read: Whether to read every file and compare its hash; without it, only existence and sizes are compared.
        known: File -> SHA-256, of files that were hashed while they were read; they are compared in any case.

    Returns:
        Faults in the order of their files; none for a whole folder, and for one without a manifest.

    Cost: with `read`, every byte of the folder is read and hashed once.
    """
    try:
        governing = _governing(folder)
    except InputError as e:
        return (Fault(MANIFEST, e.what),)
    if governing is None:
        return ()
    manifest, prefix = governing
    digests = {n[len(prefix) :]: d for n, d in manifest.get("files", {}).items() if n.startswith(prefix)}
    sizes = {n[len(prefix) :]: size for n, size in manifest.get(_SIZES, {}).items() if n.startswith(prefix)}
    faults: list[Fault] = []
    present = set(_files_in(folder, digests, faults))
    for name in sorted({*digests, *present}):
        if name not in present:
            faults.append(Fault(name, "is gone"))
        elif name not in digests:
            faults.append(Fault(name, "is not listed in the manifest"))
        elif what := _changed(folder / name, digests[name], sizes.get(name), read, (known or {}).get(name)):
            faults.append(Fault(name, what))
    return tuple(faults)


def _governing(folder: Path) -> tuple[Mapping[str, Any], str] | None:
    """The manifest that speaks of a folder, and the folder's own path in it ("" or one that ends with "/")."""
    own = read_manifest(folder)
    if own is not None:
        return own, ""
    place = folder.resolve()
    for above in list(place.parents)[:MAX_FOLDERS_ABOVE]:
        prefix = f"{place.relative_to(above).as_posix()}/"
        try:
            manifest = read_manifest(above)
        except InputError:  # not about this folder as far as anybody can tell
            continue
        if manifest and any(name.startswith(prefix) for name in manifest.get("files", {})):
            return manifest, prefix
    return None


def _files_in(folder: Path, wanted: Collection[str], faults: list[Fault]) -> Iterator[str]:
    """Everything in a folder that is no folder, as paths inside it; folders that cannot be entered become faults."""
    parents = {str(parent) for name in wanted for parent in PurePosixPath(name).parents}

    def shut(error: OSError) -> None:
        inside = Path(str(error.filename)).relative_to(folder)
        faults.append(Fault(inside.as_posix(), f"cannot be read: {error.strerror}"))

    for place, folders, files in os.walk(folder, onerror=shut):
        inside = PurePosixPath(Path(place).relative_to(folder).as_posix())
        folders[:] = sorted(f for f in folders if not f.startswith(".") or str(inside / f) in parents)
        for file in files:
            name = str(inside / file)
            if name in wanted or not (file.startswith(".") or name in (MANIFEST, CARD, *LICENSES)):
                yield name


def _changed(path: Path, digest: str, size: int | None, read: bool, known: str | None) -> str:
    """What is wrong with a listed file; "" if nothing is."""
    if not path.is_file():
        return "is not a regular file"
    if not os.access(path, os.R_OK):
        return "may not be read by this user"
    length = path.stat().st_size
    if size is not None and length != size:
        return f"has {plural(length, 'byte')}, {size} were written"
    if known is None and not read:
        return ""
    same = (known or sha256_file(path)) == digest
    return "" if same else "is not what was written: its SHA-256 is another than the manifest's"


def require_whole(folder: Path, *, read: bool, known: Mapping[str, str] | None = None) -> None:
    """Refuse a folder that is not what its manifest says; arguments as `compare_with_manifest`.

    Raises:
        Damaged: Names the first fault, and how many there are.
    """
    if not (faults := compare_with_manifest(folder, read=read, known=known)):
        return
    first, others = faults[0], len(faults) - 1
    more = f", and {others} more of its files" if others else ""
    raise Damaged(f"{first.what}{more}", where=str(folder / first.file), hint=_ADVICE)
