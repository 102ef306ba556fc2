"""Second moments of what every layer reads: collected, added, kept in files, shared instead of data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.border.lazy import lazily

if TYPE_CHECKING:
    from plait.statistics.agreement import merge_statistics as merge_statistics
    from plait.statistics.collect import collect_statistics as collect_statistics
    from plait.statistics.files import read_identity as read_identity
    from plait.statistics.files import read_statistics as read_statistics
    from plait.statistics.files import write_statistics as write_statistics
    from plait.statistics.inspect import check_statistics as check_statistics
    from plait.statistics.inspect import diff_statistics as diff_statistics
    from plait.statistics.inspect import show_statistics as show_statistics
    from plait.statistics.lazy import open_statistics as open_statistics
    from plait.statistics.moments import ModuleInfo as ModuleInfo
    from plait.statistics.moments import Moments as Moments
    from plait.statistics.moments import Statistics as Statistics
    from plait.statistics.resume import collect_shards as collect_shards
    from plait.statistics.sketch import compress_statistics as compress_statistics

_HOMES = {
    "ModuleInfo": "moments",
    "Moments": "moments",
    "Statistics": "moments",
    "check_statistics": "inspect",
    "collect_shards": "resume",
    "collect_statistics": "collect",
    "compress_statistics": "sketch",
    "diff_statistics": "inspect",
    "merge_statistics": "agreement",
    "open_statistics": "lazy",
    "read_identity": "files",
    "read_statistics": "files",
    "show_statistics": "inspect",
    "write_statistics": "files",
}
__all__ = [*_HOMES]  # noqa: PLE0604  (strings, all of them)

__getattr__ = lazily(__name__, _HOMES)
