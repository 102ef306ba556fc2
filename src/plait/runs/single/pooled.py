"""Statistics files made from statistics files: added up, or made smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from plait.border.checked import Json
from plait.disk.files import sha256_file
from plait.disk.overwriting import require_apart, require_replaceable_file
from plait.disk.store import identity, require_regular, sha256_json
from plait.errors import UsageError
from plait.runs.collecting import is_collected
from plait.statistics import (
    compress_statistics,
    merge_statistics,
    open_statistics,
    read_statistics,
    show_statistics,
    write_statistics,
)
from plait.statistics.files import HOLDS, is_statistics, read_identity
from plait.statistics.lazy import FileSites

_MERGED, _COMPRESSED = "statistics merge", "statistics compress"  # stages, as the files' identities name them


@dataclass(frozen=True, slots=True)
class Pooled:
    """Statistics files added up.

    Args:
        output: The file, absolute.
        merged: What was added up.
        reused: Whether the file was there already.
        dropped_output_gradients: Whether some of the files hold output gradients and the sum does not: not all hold those of
            the same modules.
    """

    output: str
    merged: tuple[str, ...]
    reused: bool
    dropped_output_gradients: bool


@dataclass(frozen=True, slots=True)
class Compressed:
    """A statistics file made smaller.

    Args:
        output: The file, absolute.
        rank: Directions kept per site.
        relative_error: Largest error of a site or of a module's output gradients, as a share of its trace.
        bytes_before: Size of what was made smaller.
        bytes_after: Size of the file.
        reused: Whether the file was there already.
    """

    output: str
    rank: int
    relative_error: float
    bytes_before: int
    bytes_after: int
    reused: bool


def merge_files(files: Sequence[Path], out: Path, *, overwrite: bool) -> Pooled:
    """Add up statistics files of one base, and write the sum.

    Args:
        files: What is added, in this order.
        out: The file to write.
        overwrite: Replace what stands there.

    Raises:
        UsageError: Something else stands at `out`, it is an input, or two files hold the same rows.
        InputError: A file that cannot be used, or one of another base.
    """
    require_apart(out, files)
    rows = _require_other_rows(files)
    wanted = identity(_MERGED, {}, {f"file {i}": sha256_file(f) for i, f in enumerate(files, 1)})
    reused = _stands(out, wanted, overwrite=overwrite)
    if not reused:
        added = merge_statistics(*(read_statistics(f) for f in files))
        write_statistics(out, added, identity={**wanted, HOLDS: rows}, overwrite=overwrite)
    dropped = any(open_statistics(f).output_gradients for f in files) and not open_statistics(out).output_gradients
    return Pooled(str(out.absolute()), tuple(str(f) for f in files), reused, dropped)


def compress_file(file: Path, out: Path, rank: int, *, overwrite: bool) -> Compressed:
    """Make a statistics file smaller, its error recorded.

    Args:
        file: What is made smaller.
        out: The file to write.
        rank: Directions kept per site.
        overwrite: Replace what stands there.

    Raises:
        UsageError: Something else stands at `out`, or it is the input.
        InputError: A file that cannot be used.
    """
    require_apart(out, [file])
    whole = read_statistics(file)
    wanted = identity(_COMPRESSED, {"rank": rank}, {"file": whole.sha256})
    reused = _stands(out, wanted, overwrite=overwrite)
    smaller = read_statistics(out) if reused else compress_statistics(whole, rank)
    if not reused:
        write_statistics(out, smaller, identity={**wanted, HOLDS: sorted(_rows_of(file))}, overwrite=overwrite)
    contents = show_statistics(smaller)
    summaries = chain(contents.sites.values(), contents.output_gradients.values())
    worst = max(s.relative_error for s in summaries)
    sizes = (file.stat().st_size, out.stat().st_size)
    return Compressed(str(out.absolute()), rank, worst, *sizes, reused)


def _require_other_rows(files: Sequence[Path]) -> list[str]:
    """Refuse to count rows twice: a file beside itself, a copy of it in another form, or a sum that it, or part of it, is in.

    Returns:
        What tells whose rows the files hold, all of it: what their sum is to remember.
    """
    seen: dict[str, Path] = {}
    for path in files:
        require_regular(path)
        for rows in _rows_of(path):
            other = seen.setdefault(rows, path)
            if other is not path:
                hint = "leave one of them out: its rows would count twice"
                raise UsageError(f"the same rows as in {other}", where=str(path), hint=hint)
    return sorted(seen)


def _rows_of(path: Path) -> set[str]:
    """What tells whose rows a file holds: hashes of itself, its moments, what it was collected from, and of all that it was made of.

    A file made of files remembers what each of them held, at any depth. One of an earlier version remembers their hashes alone,
    and one that was collected by such a version has no hash of its moments.
    """
    made = read_identity(path) or {}
    inputs = made.get("inputs") if made.get("stage") in (_MERGED, _COMPRESSED) else {}
    direct = inputs.values() if isinstance(inputs, dict) else ()
    holds = made.get(HOLDS)
    sites = open_statistics(path).sites
    homes = sites.homes if isinstance(sites, FileSites) else {}
    moments = [record.get("sha256") for _, record in homes.values()]
    told = {sha256_json(moments)} if moments and None not in moments else set()
    options = made.get("options")
    if made.get("stage") == "statistics" and isinstance(options, dict):  # a sketch of the same rows has other moments
        told.add(sha256_json({"seed": made.get("seed"), **{k: options.get(k) for k in ("data", "samples")}}))
    return {sha256_file(path), *direct, *(holds if isinstance(holds, list) else ()), *told}


def _stands(out: Path, wanted: Json, *, overwrite: bool) -> bool:
    """Whether the wanted file is there; what may not be replaced is refused before anything is computed."""
    if overwrite:
        require_replaceable_file(out, is_statistics)
        return False
    return is_collected(out, wanted)
