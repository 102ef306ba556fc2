"""Whether torch is needed to answer what somebody asks of a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.disk.written import Written
from plait.merging.request import MergeRequest

if TYPE_CHECKING:
    from plait.merging.outcomes import BakeRecord, RankCurve
    from plait.merging.record import MergeRecord


def answer(request: MergeRequest) -> Written[MergeRecord] | Written[BakeRecord] | RankCurve:
    """Do what is asked, and give the record of it; weighted sums of folders and LoRA files without torch, with the same bytes.

    Raises:
        UsageError: Two ways at once, or no place for the result.
    """
    from plait.merging.light.of_files import sum_without_torch

    if (done := sum_without_torch(request)) is not None:
        return done
    from plait.merging.ways import answer_by_torch

    return answer_by_torch(request)
