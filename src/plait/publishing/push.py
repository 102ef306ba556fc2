"""Sending a folder to the hub: checked first, one commit, and every way in which the hub says no told in one line."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.border.records import nested
from plait.checking.check import check_path
from plait.disk.manifest import CARD, LICENSES
from plait.errors import EnvironmentFault, InputError, PlaitError, UsageError, printable
from plait.publishing.parcel import Parcel, parcel
from plait.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

_LOGIN = "hf auth login, or HF_TOKEN=... with write access (https://huggingface.co/settings/tokens)"


@dataclass(frozen=True, slots=True)
class SentFile:
    """One file that is sent: its path in the repository and its bytes."""

    path: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Pushed:
    """What went to the hub, or would go.

    Args:
        repo: "user/name".
        base: Name of the base that it needs; None for a whole model.
        files: What is sent, by path.
        left_out: Files of the folder that are not sent, each with the reason.
        removed: Files of the repository that are no part of it and were taken out.
        private: Whether only its owner sees it.
        sent: Whether anything was sent; False for a rehearsal, and where the repository held all of it.
        url, commit: Where it is; "" for a rehearsal.
    """

    repo: str
    base: str | None
    files: tuple[SentFile, ...] = nested(SentFile)
    left_out: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    private: bool = False
    sent: bool = False
    url: str = ""
    commit: str = ""


@dataclass(frozen=True, slots=True)
class PushSettings:
    """How a folder is sent.

    Args:
        private: Only its owner sees the repository.
        base: Name of the base on the hub, where the folder names a path.
        overwrite: Replace what another result left in the repository.
        dry_run: Send nothing, ask nothing of the network; say what would go.
    """

    private: bool = False
    base: str | None = None
    overwrite: bool = False
    dry_run: bool = False


def push(folder: Path, repo: str, settings: PushSettings | None = None) -> Pushed:
    """Send an adapter or model folder to the hub in one commit.

    Args:
        folder: The folder; `plait check` has to pass on it.
        repo: "user/name".
        settings: How.

    Raises:
        UsageError: No such name, a base nobody else has, a repository that holds something else, or --offline.
        InputError: The folder is not what was written, or its loader would not load it.
        EnvironmentFault: No token, one that is refused, or no network. Nothing is seen of what had arrived.
    """
    chosen = settings or PushSettings()
    _require_name(repo)
    _require_sound(folder)
    packed = parcel(folder, repo, chosen.base)
    files = tuple(SentFile(name, packed.size(name)) for name in packed.files)
    told = Pushed(repo, packed.base, files, packed.left_out, private=chosen.private)
    return told if chosen.dry_run else _sent(packed, told, chosen)


def _require_name(repo: str) -> None:
    from huggingface_hub import utils

    validate: Any = utils.validate_repo_id  # type: ignore[attr-defined]
    try:
        validate(repo)
    except ValueError as e:
        raise UsageError(printable(e), hint="--to USER/NAME") from None
    if repo.count("/") != 1:
        raise UsageError(f"{printable(repo)!r} names no user", hint="--to USER/NAME")


def _require_sound(folder: Path) -> None:
    checked = check_path(folder)
    if len(checked) > 1:
        raise UsageError("holds several results", where=str(folder), hint=f"push one, such as {checked[0].path}")
    if checked[0].failed:
        raise InputError(
            checked[0].why,
            where=str(folder),
            hint=f"plait check {shlex.quote(str(folder))} says all of it; nothing was sent",
        )


def _sent(packed: Parcel, told: Pushed, chosen: PushSettings) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode

    if is_offline_mode():
        raise UsageError(
            "sending needs the network, which --offline (or HF_HUB_OFFLINE) forbids",
            hint="--dry-run says what would go",
        )
    token = get_token()
    if not token:
        raise EnvironmentFault("no token of the hub on this machine, so nothing was sent", hint=_LOGIN)
    api = HfApi(token=token, library_name="plait", library_version=__version__)
    with _told(packed.repo):
        there = _existing(api, packed.repo)
        stale = _require_free(packed, there, chosen)
        if there is not None and not stale and _holds(there, packed):
            return replace(
                told, private=bool(there.private), url=f"{api.endpoint}/{packed.repo}", commit=there.sha or ""
            )
        if there is None:
            api.create_repo(packed.repo, private=chosen.private or None, exist_ok=True)
        added = [CommitOperationAdd(name, _content(content)) for name, content in packed.files.items()]
        removed = [CommitOperationDelete(name) for name in stale]
        done = api.create_commit(
            packed.repo,
            [*added, *removed],
            commit_message=f"Upload by plait {__version__}",
            parent_commit=there.sha if there is not None else None,
        )
    private = chosen.private or bool(there is not None and there.private)
    return replace(
        told, private=private, removed=tuple(stale), sent=True, url=f"{api.endpoint}/{packed.repo}", commit=done.oid
    )


def _content(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


def _existing(api: HfApi, repo: str) -> ModelInfo | None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError as e:
        if e.response is not None and e.response.status_code == 401:  # what the hub says to a token it does not know
            raise
        return None


def _require_free(packed: Parcel, there: ModelInfo | None, chosen: PushSettings) -> list[str]:
    """Refuse a repository that holds another result; with `overwrite`, the files of that one which this has not."""
    if there is None:
        return []
    if chosen.private and not there.private:
        raise UsageError(
            "exists and is public, so that --private has no effect", where=packed.repo, hint="another name"
        )
    names = [s.rfilename for s in there.siblings or ()]
    stale = [n for n in names if n not in packed.files and not n.startswith(".") and n not in LICENSES]
    holds = [n for n in names if n not in (CARD, *LICENSES) and not n.startswith(".")]
    if holds and not chosen.overwrite and not (not stale and _holds(there, packed)):
        raise UsageError(
            f"exists and holds another {holds[0]!r}",
            where=packed.repo,
            hint="--overwrite replaces it, or take another name",
        )
    return stale


def _holds(there: ModelInfo, packed: Parcel) -> bool:
    """Whether the repository holds every file, byte for byte."""
    known = {s.rfilename: (s.lfs.sha256 if s.lfs else None, s.blob_id) for s in there.siblings or ()}
    for name, content in packed.files.items():
        large, small = known.get(name, (None, None))
        data = content if isinstance(content, bytes) else None if large else content.read_bytes()
        if large is not None:
            digest = hashlib.sha256(data).hexdigest() if data is not None else _sha256(content)
            if digest != large:
                return False
        elif data is None or hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() != small:
            return False
    return True


def _sha256(content: Path | bytes) -> str:
    from plait.disk.files import sha256_file

    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_file(content)


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Turn what the hub and the network say into one of plait's errors."""
    try:
        yield
    except PlaitError:
        raise
    except Exception as e:  # of several packages
        raise _fault(e, repo) from e


_SAID: Mapping[int, tuple[str, str]] = {
    401: ("the hub does not know this token", _LOGIN),
    403: ("this token may not write there", f"your own user name, or a token with write access: {_LOGIN}"),
    409: ("somebody else changed the repository meanwhile", "run the same command again"),
    412: ("somebody else changed the repository meanwhile", "run the same command again"),
    429: ("the hub asks to wait: too many requests", "run the same command again later"),
}


def _fault(error: Exception, repo: str) -> PlaitError:
    for cause in _causes(error):
        response: Any = getattr(cause, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            if status in _SAID:
                what, hint = _SAID[status]
                return EnvironmentFault(f"{what}; nothing was published", where=repo, hint=hint)
            return EnvironmentFault(
                f"the hub said {status}: {_first_line(cause)}", where=repo, hint="nothing was published"
            )
    return EnvironmentFault(
        f"the upload broke off ({_first_line(_causes(error)[-1])}); nothing was published",
        where=repo,
        hint="run the same command again: what has arrived is not sent twice",
    )


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _first_line(error: BaseException) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 200)
