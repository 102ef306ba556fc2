"""Where results come to rest: staged folders, manifests, hashes and locks.

A folder (or file) is written beside its destination, flushed, given the permissions the umask allows, and renamed into
place; its manifest is written last, so a manifest means the result is whole. A result whose manifest matches the wanted
one is reused; one that differs is an error that shows the difference.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from plait.disk.card import card_of
from plait.disk.durable import absent_above, flush_above, flush_file, flush_folders
from plait.disk.files import canonical_json as canonical_json
from plait.disk.files import read_json as read_json
from plait.disk.files import require_regular as require_regular
from plait.disk.files import sha256_file as sha256_file
from plait.disk.files import sha256_json as sha256_json
from plait.disk.installed import versions as versions
from plait.disk.locks import locked, system_errors
from plait.disk.manifest import CARD, CARD_HASH, require_wanted, require_whole, sealed
from plait.disk.manifest import MANIFEST as MANIFEST
from plait.disk.manifest import SCHEMA as SCHEMA
from plait.disk.manifest import differences as differences
from plait.disk.manifest import read_manifest as read_manifest
from plait.disk.overwriting import require_replaceable, require_replaceable_file
from plait.errors import Unfinished, UsageError
from plait.loading import require_loadable

_LOADED = (".safetensors", ".gguf")  # files that other programs load


# --- identity ---------------------------------------------------------------------------------------------------------


def identity(
    stage: str, options: Mapping[str, Any], inputs: Mapping[str, str] | None = None, seed: int | None = None
) -> dict[str, Any]:
    """Say what a result *is*: the stage, its options, the hashes of its inputs and the seed.

    >>> identity("merge", {"method": "ties"}, {"adapter:a": "0123"})["options"]
    {'method': 'ties'}

    Args:
        stage: Name of the stage, such as "merge".
        options: JSON-serialisable options.
        inputs: Name of each input -> its hash.
        seed: The seed, where the stage draws random numbers.

    Returns:
        A JSON object; two results with equal identities hold the same bits on one machine.
    """
    wanted = {"schema": SCHEMA, "stage": stage, "options": dict(options), "inputs": dict(inputs or {}), "seed": seed}
    return json.loads(canonical_json(wanted))  # type: ignore[no-any-return]


# --- writing ----------------------------------------------------------------------------------------------------------


def is_done(path: Path, wanted: Mapping[str, Any], *, overwrite: bool = False, read: bool = False) -> bool:
    """Whether the folder already holds the wanted result, whole.

    Args:
        path: The folder.
        wanted: The identity of the result (see `identity`).
        overwrite: Whether it is to be made again in any case.
        read: Whether to compare the hashes of its files too, as where they are used again; existence and sizes always are.

    Raises:
        UsageError: It holds another one (the difference is in the message), or something that is not a result; with
            `overwrite`, something that may not be replaced.
        Damaged: It held the wanted one, and files were changed or are gone since.
    """
    if overwrite:
        require_replaceable(path)
        return False
    if not path.exists() and _aside(path).exists():
        with locked(path):
            _recover(path)
    if not _occupied(path):
        return False
    found = read_manifest(path) if path.is_dir() else None
    if found is None:
        raise Unfinished(
            "exists and was not finished by plait",
            where=str(path),
            hint="choose another --out, or remove it yourself",  # --overwrite would refuse it
        )
    require_wanted(path, found, wanted)
    require_whole(path, read=read)
    return True


def discard(path: Path) -> None:
    """Remove what is left of a unit of a run or a study, so that it can be done again.

    Raises:
        UsageError: It is not plait's, or holds what plait did not write.
        EnvironmentFault: Another process holds it.
    """
    path = path.absolute()
    with system_errors(path), locked(path):
        stage = path.parent / f".{path.name}.staging"
        for place in (stage, path):
            if place.is_dir() and not place.is_symlink():
                if place == path:
                    require_replaceable(path, unit=True)
                    path.rename(stage)  # whatever happens from here on, the next writer clears it away
                shutil.rmtree(stage)
            elif place == path:
                require_replaceable_file(path, None)
                path.unlink(missing_ok=True)


def _occupied(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir())))


@contextlib.contextmanager
def staged_folder(
    path: Path,
    wanted: Mapping[str, Any],
    *,
    overwrite: bool = False,
    result: dict[str, Any] | None = None,
    check: Callable[[Path], None] | None = None,
    digests: Mapping[str, Callable[[], str]] | None = None,
    unit: bool = False,
) -> Iterator[Path]:
    """Yield an empty folder on the destination's file system; on success it takes the destination's place, whole.

    Args:
        path: The destination.
        wanted: Its identity (see `identity`), written into the manifest, which is written last.
        overwrite: Replace what stands there, if plait wrote it; it comes back if the new result fails.
        result: Filled by the caller inside the block or by `check`; kept in the manifest, not part of the identity.
        check: Looks at the written folder while the disk flushes it; what it raises leaves the destination as it was.
        digests: Filled inside the block for files that are hashed while written: path in the folder -> waits for the hash.
        unit: See `plait.disk.overwriting.require_replaceable`.

    Raises:
        RunError: An adapter or model in it would not be loaded as it was meant (see `plait.loading.require_loadable`).
        UsageError: Something stands there that is not replaced.
        EnvironmentFault: Disk full, read-only, or another process is writing the same output.
    """
    path = path.absolute()
    made = absent_above(path)
    with system_errors(path), locked(path):
        _recover(path)
        if _occupied(path) and not overwrite:
            raise UsageError("exists", where=str(path), hint="choose another --out, or --overwrite")
        require_replaceable(path, unit=unit)
        stage = path.parent / f".{path.name}.staging"
        shutil.rmtree(stage, ignore_errors=True)  # left by a killed run: the lock says nobody writes it now
        stage.mkdir(parents=True)
        try:
            yield stage
            _finish(stage, path.name, wanted, {} if result is None else result, check, digests or {})
            _swap(stage, path)
            flush_above(path, made)
            shutil.rmtree(_aside(path), ignore_errors=True)  # only now: a power loss may have undone the renames
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _finish(
    stage: Path,
    name: str,
    wanted: Mapping[str, Any],
    result: Mapping[str, Any],
    check: Callable[[Path], None] | None,
    digests: Mapping[str, Callable[[], str]],
) -> None:
    files = sorted(p for p in stage.rglob("*") if p.is_file() and p not in (stage / MANIFEST, stage / CARD))
    # While the disk flushes, the cores hash and check: threads that wait for the one do not keep the other.
    with ThreadPoolExecutor(2) as disk, ThreadPoolExecutor(2) as cores:
        settled = disk.map(_settle, [*files, *(stage.glob(CARD))])
        names = {str(p.relative_to(stage)): p for p in files}
        hashes = {n: digests.get(n) or cores.submit(sha256_file, p).result for n, p in names.items()}
        if check:
            check(stage)
        require_loadable(stage)
        listed = {name: (names[name].stat().st_size, digest()) for name, digest in hashes.items()}
        list(settled)  # raises what the disk met
    record = {**wanted, "versions": versions(), "result": dict(result)}
    manifest = sealed({**record, **_carded(stage, name, record)}, listed)
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (stage / MANIFEST).write_text(text + "\n", encoding="utf-8")
    _settle(stage / MANIFEST)
    flush_folders(stage)


def _carded(stage: Path, name: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Write the model card, where there is something to describe and no card yet; what the manifest keeps of it.

    The card is not listed among the files. Its hash tells whether somebody edited it, so that `--overwrite` takes no one's text.
    """
    if not (stage / CARD).exists() and (text := card_of(stage, name, record)) is not None:
        (stage / CARD).write_text(text, encoding="utf-8")
        _settle(stage / CARD)
    return {CARD_HASH: sha256_file(stage / CARD)} if (stage / CARD).is_file() else {}


def _settle(path: Path) -> None:
    """Give a file the mode the umask allows (some libraries write 0600) and flush it."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    flush_file(path)


def _recover(path: Path) -> None:
    """Bring back what a run killed between the two renames of `_swap` had moved aside."""
    if _aside(path).exists() and not _occupied(path):
        _aside(path).rename(path)


def _aside(path: Path) -> Path:
    return path.absolute().parent / f".{path.absolute().name}.replaced"


def _swap(stage: Path, path: Path) -> None:
    old = _aside(path)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        stage.rename(path)
    except BaseException:
        _recover(path)
        raise


@contextlib.contextmanager
def staged_file(path: Path, *, overwrite: bool = False, ours: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and takes its place.

    Args:
        path: The destination.
        overwrite: Replace what stands there.
        ours: Whether a file is one that the caller's command writes, and no other is replaced; None where the place is
            plait's own, such as a run's recipe.

    Raises:
        UsageError: Something stands there that is not replaced.
        EnvironmentFault: Disk full, read-only, or another process is writing the same output.
    """
    path = path.absolute()
    made = absent_above(path)
    with system_errors(path), locked(path):
        if _occupied(path) and not overwrite:
            raise UsageError("exists", where=str(path), hint="choose another --out, or --overwrite")
        require_replaceable_file(path, ours)
        stage = path.parent / f".{path.name}.staging"
        stage.unlink(missing_ok=True)
        try:
            yield stage
            if path.suffix in _LOADED:
                require_loadable(stage)
            _settle(stage)
            stage.replace(path)
            flush_above(path, made)
        finally:
            stage.unlink(missing_ok=True)
