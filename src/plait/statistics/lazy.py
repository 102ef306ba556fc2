"""Statistics that stay in their files: a site is read when it is asked for, and nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from plait.adapters.tensors import read_layout, read_some
from plait.border.checked import Record
from plait.errors import InputError, UsageError
from plait.statistics.files import moments_of, record_of
from plait.statistics.moments import ModuleInfo, Moments, Statistics
from plait.statistics.records import GRADIENTS, PARTS, file_record, site_record


class FileSites(Mapping[str, Moments]):
    """Sites, or output gradients by module, of one or several statistics files.

    Args:
        homes: Site -> (file, its record there).
        prefix: What stands before the names of its tensors.
    """

    def __init__(self, homes: Mapping[str, tuple[Path, Mapping[str, object]]], prefix: str = "") -> None:
        self.homes, self.prefix = dict(homes), prefix

    def __getitem__(self, site: str) -> Moments:
        path, record = self.homes[site]
        site = self.prefix + site
        tensors = read_some(path, [f"{site}|{part}" for part in PARTS])
        facts = site_record(Record.of(record, str(path), inside=site if self.prefix else f"sites.{site}"))
        if missing := [p for p in ("total", "second") if f"{site}|{p}" not in tensors]:
            raise InputError(f"site {site!r} has no tensor {missing[0]!r} any more", where=str(path))
        return moments_of(site, facts, tensors, path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)


def open_statistics(path: str | Path) -> Statistics:
    """Open a statistics file of which only the record is read; each site's tensors are read and checked when asked for.

    So the memory of what walks site by site (`compute_subspaces`, `show_statistics`) is that of one site, whatever
    number of layers the base has.

    Raises:
        InputError: Not such a file, or of another schema; later, from the site at fault: tensors that do not fit.
    """
    path = Path(path)
    metadata, entries, _ = read_layout(path)
    record = file_record(record_of(metadata, path), entries, path)
    homes, measured = (
        {n: (path, raw) for n, raw in those.items()} for those in (record.raw_sites, record.raw_gradients)
    )
    gradients = FileSites(measured, GRADIENTS)
    return Statistics(FileSites(homes), record.modules, record.provenance, output_gradients=gradients)


def read_own_and_others(own: str | Path, others: Sequence[str | Path]) -> tuple[str, dict[str, Statistics]]:
    """Open a task's statistics and the others', by task; a file of the own task among the others is left out.

    Raises:
        UsageError: Two files of one task.
    """
    own = Path(own)
    mine = open_statistics(own)
    task = task_recorded(mine, own)
    statistics = {task: mine}
    for path in map(Path, others):
        if path.exists() and path.samefile(own):  # a glob over the pool may hold it too
            continue
        other = open_statistics(path)
        name = task_recorded(other, path)
        _require_without(task, other, path)
        if name in statistics:
            raise UsageError(
                f"two statistics files of task {name!r}", where=str(path), hint="a task is not another of itself"
            )
        statistics[name] = other
    return task, statistics


def open_background(task: str, paths: Sequence[str | Path]) -> list[Statistics]:
    """Open statistics of public text that stand for tasks nobody knows yet.

    Raises:
        UsageError: One of them holds the task's own rows, which are no background to themselves.
    """
    pools = []
    for path in map(Path, paths):
        pools.append(open_statistics(path))
        if pools[-1].provenance.get("task") == task:
            raise UsageError(
                f"statistics of {task!r} itself", where=str(path), hint="a task is no background of itself"
            )
        _require_without(task, pools[-1], path)
    return pools


def _require_without(task: str, pool: Statistics, path: Path) -> None:
    if task in pool.provenance.get("tasks", ()):
        what = f"the pool was merged from files of {task!r} too"
        raise UsageError(what, where=str(path), hint="pass the other files one by one")


def task_recorded(statistics: Statistics, path: Path) -> str:
    """Name the task that a statistics file is of: as it says itself, else by its name."""
    return str(statistics.provenance.get("task") or path.name.split(".")[0])


def joined(parts: Sequence[Statistics], modules: Mapping[str, ModuleInfo]) -> Statistics:
    """Join the sites of several statistics, such as groups of layers; the record is the first one's."""
    homes = {s: home for part in parts if isinstance(part.sites, FileSites) for s, home in part.sites.homes.items()}
    sites = FileSites(homes) if homes else {s: m for part in parts for s, m in part.sites.items()}
    return Statistics(sites, modules, parts[0].provenance)
