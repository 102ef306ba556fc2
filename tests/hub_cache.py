"""The hub's cache as its client lays it out, made by hand: no network."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest


def cached(cache: Path, repo: str, folder: Path, ref: str = "main", commit: str | None = None) -> str:
    """Put a folder into the cache as a commit of a repository: blobs, links to them, a ref; the commit."""
    root = cache / f"models--{repo.replace('/', '--')}"
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    digests = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    commit = commit or hashlib.sha1("".join(digests.values()).encode(), usedforsecurity=False).hexdigest()
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    for path, digest in digests.items():
        (root / "blobs" / digest).write_bytes(path.read_bytes())
        link = root / "snapshots" / commit / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(root / "blobs" / digest, link.parent))
    (root / "refs" / ref).write_text(commit)
    return commit


def use_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Have the hub's client and transformers look into this cache, offline."""
    import huggingface_hub.constants as constants

    from plait.disk import hub

    hub.snapshot.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
