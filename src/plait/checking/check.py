"""`plait check`: a result held against its manifest or its own digest, byte by byte, and what other programs load from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from plait.adapters.sealed import SEAL, SEALED, is_sealed, read_sealed
from plait.adapters.tensors import read_metadata
from plait.checking.finite import not_finite
from plait.checking.on_base import Comparison, compare_on_base
from plait.disk.hub import adapter_place
from plait.disk.manifest import MANIFEST, compare_with_manifest
from plait.errors import Damaged, InputError, UsageError
from plait.loading import Account, accounts, loader_named
from plait.loading.account import Effect
from plait.loading.gguf import GGUF_MAGIC, read_gguf
from plait.statistics import files, fisher
from plait.statistics.inspect import check_statistics

_MARKS = (MANIFEST, "adapter_config.json")
MAX_DEPTH, MAX_RESULTS = 6, 10_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """One loader's account in a few words.

    Args:
        verdict: "ok", "refuses it" or "loads something else".
        counts: Whether its faults make the check fail.
        effects: Effect -> number of tensors.
    """

    verdict: str
    counts: bool
    effects: Mapping[Effect, int]


@dataclass(frozen=True, slots=True)
class Checked:
    """One folder or file, checked.

    Args:
        path: What was checked.
        listed: Whether a manifest lists its files, or the file carries a digest of itself.
        changed: What differs from that: "file what"; of statistics, also what cannot be.
        accounts: One for each loader that opens it.
        asked: The loader whose faults count; None where those of the format's own do.
        base: What PEFT made of it on its base, where that was asked.
        damaged: Tensors that hold NaN or infinity, "file what".
    """

    path: Path
    listed: bool
    changed: tuple[str, ...]
    accounts: tuple[Account, ...]
    asked: str | None = None
    base: Comparison | None = None
    damaged: tuple[str, ...] = ()

    def counts(self, account: Account) -> bool:
        """Whether an account's faults make the check fail."""
        return account.loader == self.asked if self.asked else account.own

    @property
    def failed(self) -> bool:
        """Whether a file was changed or holds NaN, or a loader that counts would load something else than what was meant."""
        lost = self.base is not None and bool(self.base.faults)
        return (
            lost or bool(self.changed) or bool(self.damaged) or any(a.faults and self.counts(a) for a in self.accounts)
        )

    @property
    def why(self) -> str:
        """The first thing that is wrong, in one line; "" where nothing is."""
        if wrong := (*self.changed, *self.damaged):
            return wrong[0]
        for account in self.accounts:
            if account.faults and self.counts(account):
                first = account.faults[0]
                return f"{account.loader} {account.version}: {first.tensor} {first.what}"
        return self.base.faults[0] if self.base is not None and self.base.faults else ""

    def verdict_of(self, account: Account) -> Verdict:
        """Sum up what one loader makes of it."""
        loud = any(f.raises for f in account.faults)
        word = "ok" if not account.faults else "refuses it" if loud else "loads something else"
        return Verdict(word, self.counts(account), dict(Counter(p.effect for p in account.placements)))

    def record(self) -> Mapping[str, object]:
        """Give all of it as JSON can hold it."""
        return {
            "path": str(self.path),
            "ok": not self.failed,
            "listed": self.listed,
            "changed": list(self.changed),
            "damaged": list(self.damaged),
            "accounts": [{**asdict(self.verdict_of(a)), **asdict(a)} for a in self.accounts],
            "base": None if self.base is None else asdict(self.base),
        }


def check_path(path: Path, loader: str | None = None, base: str | None = None) -> tuple[Checked, ...]:
    """Check a folder or file; of a folder of results (a run, a pool), every result in it.

    Args:
        path: What to check; an adapter on the hub by its name.
        loader: The loader that has to load it rightly; None for the format's own.
        base: Folder or name of a base on which PEFT is to load it.

    Returns:
        One for each result, in the order of their paths.

    Raises:
        InputError: Nothing to check there, or what is there cannot be read.
        UsageError: An unknown loader, or a base for several results.
    """
    asked, path = None if loader is None else loader_named(loader), adapter_place(path)
    if not path.exists():
        raise InputError("no such folder or file", where=str(path))
    results = [path] if path.is_file() or any((path / m).exists() for m in _MARKS) else list(_results(path)) or [path]
    if base and len(results) > 1:
        raise UsageError("a base is for one adapter", hint=f"such as {results[0]}")
    checks = tuple(_checked(result, asked, base) for result in results)
    if asked and not any(c.accounts for c in checks):
        raise UsageError(
            f"{asked} opens nothing of this kind", where=str(path), hint="leave --for out to see what does"
        )
    return checks


def _checked(path: Path, asked: str | None, base: str | None) -> Checked:
    return _checked_file(path, asked, base) if path.is_file() else _checked_folder(path, asked, base)


def _checked_file(path: Path, asked: str | None, base: str | None) -> Checked:
    own = own_file(path)
    changed = tuple(f"{path.name} {problem}" for problem in own.problems)
    loaded = accounts(path, [asked] if asked else None) if own.loadable else ()
    damaged = not_finite(path) if own.loadable and path.suffix == ".safetensors" else ()
    return Checked(path, own.listed, changed, loaded, asked, compare_on_base(path, base) if base else None, damaged)


def _checked_folder(path: Path, asked: str | None, base: str | None) -> Checked:
    listed = path.is_dir() and (path / MANIFEST).exists()
    changed = tuple(f"{f.file} {f.what}" for f in compare_with_manifest(path, read=True)) if listed else ()
    try:
        loaded = accounts(path, [asked] if asked else None)
    except InputError:
        if not listed:
            raise
        loaded = ()  # statistics, scores: only their files can be checked; a file that is damaged is told above
    compared = compare_on_base(path, base) if base else None
    return Checked(path, listed, changed, loaded, asked, compared, not_finite(path))


def _results(path: Path) -> Iterator[Path]:
    """Folders below that hold a manifest or an adapter; not what lies inside of those."""
    waiting, seen = [(path, 0)], 0
    while waiting and seen < MAX_RESULTS:
        folder, depth = waiting.pop()
        seen += 1
        if depth and any((folder / m).exists() for m in _MARKS):
            yield folder
        elif depth < MAX_DEPTH:
            inside = [p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith(".")]
            waiting += [(p, depth + 1) for p in sorted(inside, reverse=True)]


# --- single files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OwnFile:
    """What a file says about itself.

    Args:
        listed: Whether it holds a digest of what it holds.
        problems: What is not as it was written, or cannot be what it says; empty where all is well.
        loadable: Whether other programs load files of this kind, so that there is an account of their loading.
    """

    listed: bool
    problems: tuple[str, ...]
    loadable: bool


def own_file(path: Path) -> OwnFile:
    """Read every byte of a file and compare it with the digest that it carries.

    Statistics and Fisher diagonals are read as their commands read them, so that what cannot be (a moment with negative
    eigenvalues, NaN) is found as well.

    Raises:
        InputError: Neither a whole safetensors file nor a GGUF file.
        EnvironmentFault: A GGUF file of plait's, and the package `gguf` is missing.
    """
    with path.open("rb") as f:
        start = f.read(len(GGUF_MAGIC))
    if start == GGUF_MAGIC:
        return _gguf(path)
    metadata = read_metadata(path)
    if metadata.get("kind") in _KINDS:
        listed = is_sealed(metadata) or bool(metadata.get("statistics_sha256"))
        return OwnFile(listed, _problems(_KINDS[metadata["kind"]], path), False)
    return OwnFile(is_sealed(metadata), _problems(_sealed, path), True)


def _problems(look: Callable[[Path], list[str]], path: Path) -> tuple[str, ...]:
    try:
        return tuple(look(path))
    except InputError as e:
        return (e.what,)


def _statistics(path: Path) -> list[str]:
    return list(check_statistics(files.read_statistics(path)).problems)


def _fisher(path: Path) -> list[str]:
    fisher.read_fisher(path)
    return []


def _sealed(path: Path) -> list[str]:
    read_sealed(path)
    return []


_KINDS = {files.KIND: _statistics, fisher.KIND: _fisher}


def _gguf(path: Path) -> OwnFile:
    """By the header first, as only plait's own files need the package `gguf` here."""
    if not {SEAL, SEALED} & read_gguf(path).values.keys():
        return OwnFile(False, (), True)
    from plait.formats.gguf_file import require_gguf_seal
    from plait.formats.gguf_reading import opened_gguf

    try:
        require_gguf_seal(opened_gguf(path), path)
    except Damaged as e:
        return OwnFile(True, (e.what,), True)
    return OwnFile(True, (), True)
