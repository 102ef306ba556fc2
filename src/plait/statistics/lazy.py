"""Statistics that stay in their files: a site is read when it is asked for, and nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from plait.adapters.tensors import read_metadata, read_some
from plait.errors import InputError
from plait.statistics.files import PARTS, module_of, moments_of, record_of
from plait.statistics.moments import ModuleInfo, Moments, Statistics


class FileSites(Mapping[str, Moments]):
    """Sites of one or several statistics files.

    Args:
        homes: Site -> (file, its record there).
    """

    def __init__(self, homes: Mapping[str, tuple[Path, Mapping[str, object]]]) -> None:
        self.homes = dict(homes)

    def __getitem__(self, site: str) -> Moments:
        path, record = self.homes[site]
        tensors = read_some(path, [f"{site}|{part}" for part in PARTS])
        try:
            return moments_of(site, record, tensors, path)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise InputError(f"its record is incomplete: {type(e).__name__} {e}", where=str(path)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)


def open_statistics(path: str | Path) -> Statistics:
    """A statistics file of which only the record is read; each site's tensors are read and checked when asked for.

    So the memory of what walks site by site (`compute_subspaces`, `show_statistics`) is that of one site, whatever
    number of layers the base has.

    Raises:
        InputError: Not such a file, or of another schema; later, from the site at fault: tensors that do not fit.
    """
    path = Path(path)
    record = record_of(read_metadata(path), path)
    try:
        homes = {str(s): (path, dict(r)) for s, r in record["sites"].items()}
        modules = {n: module_of(i) for n, i in record["modules"].items()}
        provenance = dict(record["provenance"])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(f"its record is incomplete: {type(e).__name__} {e}", where=str(path)) from None
    if odd := [n for n, i in modules.items() if i.site not in homes]:
        raise InputError(f"module {odd[0]!r} reads a site that is not in the file", where=str(path))
    return Statistics(FileSites(homes), modules, provenance)


def joined(parts: Sequence[Statistics], modules: Mapping[str, ModuleInfo]) -> Statistics:
    """The sites of several statistics, such as groups of layers, as those of one; the record is the first one's."""
    homes = {s: home for part in parts if isinstance(part.sites, FileSites) for s, home in part.sites.homes.items()}
    sites = FileSites(homes) if homes else {s: m for part in parts for s, m in part.sites.items()}
    return Statistics(sites, modules, parts[0].provenance)
