"""Names on the Hugging Face hub: what looks like one, and the folder that holds it, from the cache or downloaded."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.disk.locks import STEPS
from plait.errors import EnvironmentFault, InputError
from plait.progress import note

_ID = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@([A-Za-z0-9][\w./-]*))?")
_ADAPTER = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model.safetensors.index.json", "plait.json")
_HEADS = "heads/*.safetensors"
_READ = (".safetensors", ".json")  # of what a manifest lists; never a pickle


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One commit of a repository, in the hub's cache.

    Args:
        repo: "user/name".
        commit: 40 hexadecimal digits.
        folder: Where its files lie.
    """

    repo: str
    commit: str
    folder: Path

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"


def go_offline() -> None:
    """Ask nothing of the network from now on, nor have a process that is started from here ask."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
    loaded: Any = sys.modules.get("huggingface_hub.constants")  # it read its variable when it was imported
    if loaded is not None:
        loaded.HF_HUB_OFFLINE = True


def split_revision(text: str) -> tuple[str, str | None]:
    """``user/name@revision`` as its two parts; other texts, and names of existing paths, as they are.

    >>> split_revision("somebody/adapter@main")
    ('somebody/adapter', 'main')
    """
    match = _ID.fullmatch(text)
    return (match[1], match[2]) if match and match[2] and not _exists(text) else (text, None)


def is_hub_name(text: str) -> bool:
    """Whether a text can name a repository: ``name``, ``user/name``, each with or without ``@revision``; no local path.

    >>> is_hub_name("somebody/adapter@main"), is_hub_name("../adapter")
    (True, False)
    """
    match = _ID.fullmatch(text)
    return bool(match) and ".." not in text and not _exists(text)


def snapshot_of(folder: Path) -> Snapshot | None:
    """Recognise a folder of the hub's cache; None for any other folder."""
    if not re.fullmatch("[0-9a-f]{40}", folder.name) or folder.parent.name != "snapshots":
        return None
    kind, dashes, repo = folder.parent.parent.name.partition("--")
    return Snapshot(repo.replace("--", "/"), folder.name, folder) if kind == "models" and dashes else None


def name_of(folder: Path) -> str:
    """Name a folder: its own name, or its repository's where it lies in the hub's cache."""
    whole = folder.absolute()
    hub = snapshot_of(whole) or snapshot_of(whole.resolve())
    return hub.repo.rpartition("/")[2] if hub else whole.resolve().name


def hub_facts(folder: Path) -> dict[str, str]:
    """Say what a record keeps of an input from the hub: {"hub": "user/name@commit"}; nothing of a folder of one's own."""
    hub = snapshot_of(folder.absolute())
    return {"hub": str(hub)} if hub else {}


def adapter_place(text: str | Path) -> Path:
    """Find the folder or file of an adapter: what exists on this machine, else ``user/name`` or ``user/name@revision`` on the hub.

    Returns:
        The path itself where it exists or cannot be a hub name (a folder of the first part's name stands here: a
        misspelt path is never looked for elsewhere); else the snapshot's folder.

    Raises:
        InputError: It looks like a hub name and is neither here, nor in the cache, nor on the hub.
    """
    path, written = Path(text), str(text)
    if _exists(written):
        _say_which(written)
        return path
    if not is_hub_name(written) or "/" not in written.partition("@")[0] or Path(path.parts[0]).exists():
        return path
    repo, revision = split_revision(written)
    repository = snapshot(repo, revision, (*_ADAPTER, _HEADS), what="adapter")
    if more := _listed(repository.folder / "plait.json"):
        repository = snapshot(repo, repository.commit, (*_ADAPTER, _HEADS, *more), what="adapter")
    return repository.folder


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """Find the folder of a repository in the cache, whatever files of it are there; None without one. Nothing is downloaded."""
    if not is_hub_name(name):
        return None
    try:
        return snapshot(name, revision, (), what="model", local_only=True).folder
    except InputError:
        return None


@functools.lru_cache(maxsize=64)
def snapshot(
    repo: str, revision: str | None, patterns: Sequence[str], *, what: str, local_only: bool = False
) -> Snapshot:
    """Fetch a repository's files that match, from the cache where the hub is out of reach or was ruled out.

    Args:
        repo: "user/name".
        revision: Commit, tag or branch; "main" by default.
        patterns: Patterns of file names.
        what: What is looked for, for messages.
        local_only: Look into the cache alone.

    Raises:
        InputError: Neither in the cache nor on the hub.
        EnvironmentFault: The disk is full or cannot be written.
    """
    from huggingface_hub import is_offline_mode, snapshot_download

    whole = f"{repo}@{revision}" if revision else repo
    offline = local_only or is_offline_mode()
    try:
        folder = Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(patterns), local_files_only=offline)
        )
    except Exception as e:  # of several packages: what the hub, the network and the cache say
        if isinstance(e, OSError) and e.errno in STEPS:
            raise EnvironmentFault(f"cannot download: {e.strerror}", where=whole, hint=STEPS[e.errno]) from e
        raise InputError(_why(what, offline, e), where=whole, hint=_way_out(repo, revision)) from e
    commit = snapshot_of(folder)
    return commit or Snapshot(repo, folder.name, folder)


def _why(what: str, offline: bool, error: Exception) -> str:
    """What went wrong, in one sentence."""
    kind = type(error).__name__
    if kind == "IncompleteSnapshotError":
        return f"this {what} is only partly in the hub's cache"
    if kind == "GatedRepoError":
        return f"this {what} is gated: its owner must let you in"
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError"):
        return f"no such {what}: no folder of this name here, and nothing on the hub"
    reached = "" if offline else ", and the hub cannot be reached"
    return f"no such {what}: no folder of this name here, nothing in the hub's cache{reached}"


def _way_out(repo: str, revision: str | None) -> str:
    return f"hf download {repo}{f' --revision {revision}' if revision else ''}, or name a local folder"


def _listed(manifest: Path) -> tuple[str, ...]:
    """What else a result of plait consists of."""
    if not manifest.is_file():
        return ()
    from plait.disk.manifest import read_manifest

    files: dict[str, Any] = (read_manifest(manifest.parent) or {}).get("files", {})
    return tuple(f for f in files if Path(f).suffix in _READ and ".." not in f)


def _exists(text: str) -> bool:
    try:
        path = Path(text).expanduser()
        return path.exists() or path.is_symlink()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have
        return False


@functools.lru_cache(maxsize=256)
def _say_which(text: str) -> None:
    """Tell on stderr, once, that a folder hides a repository of the cache."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text):
        return
    from huggingface_hub.constants import HF_HUB_CACHE

    if Path(HF_HUB_CACHE, f"models--{text.replace('/', '--')}").is_dir():
        note(f"{text} is a folder here and a repository in the hub's cache: the folder is taken")
