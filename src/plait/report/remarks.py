"""What a reader should know of a run's results besides the numbers: in a sentence, and one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.border.counts import plural
from plait.disk.manifest import MANIFEST
from plait.disk.store import read_manifest
from plait.report.table import Row, alone_unit
from plait.runs.layout import Layout
from plait.runs.lengths import sentences
from plait.runs.unit_records import completed_rows
from plait.runs.waves import chosen
from plait.subspaces.start import completion_note
from plait.tasks.lengths import Cut, whole_length

__all__ = ["ONE_BY_ONE", "Remark", "remarks_of"]
ONE_BY_ONE = "Remarks, one by one"


@dataclass(frozen=True, slots=True)
class Remark:
    """Sentences of one kind.

    Args:
        brief: All of them in a sentence.
        each: The sentences.
    """

    brief: str
    each: Sequence[str]

    @property
    def first(self) -> str:
        """What stands where the page begins: the sentence itself where it is alone."""
        return self.each[0] if len(self.each) == 1 else f"{self.brief} Each is told under *{ONE_BY_ONE}*."


def remarks_of(layout: Layout, rows: Sequence[Row]) -> list[Remark]:
    """Say which scales lie on an edge, which starts had to be completed, and which texts are cut: nobody read what was cut.

    Args:
        layout: Layout of a finished run.
        rows: Its rows without the ablations'.
    """
    found = [_edges(rows), _completed(layout), _cut(layout)]
    return [remark for remark in found if remark.each]


def _edges(rows: Sequence[Row]) -> Remark:
    edges = list(dict.fromkeys(f"{r.arm} under {r.method}" for r in rows if r.edge))
    text = f"The best scale lies on the edge of its grid, which may be too narrow: {', '.join(edges)}."
    return Remark(text, [text] if edges else [])


def _completed(layout: Layout) -> Remark:
    """Adapters of the first seed that start from rows which their subspace method had to complete."""
    each: dict[str, list[str]] = {}
    for arm in (a for a in layout.recipe.arm_specs if not a.snapshot):
        unit = alone_unit(arm.name, chosen(layout, arm), layout.recipe.seeds[0])
        folder = layout.path(layout.trained_by(unit))
        for task in layout.tasks:
            manifest = read_manifest(folder / task) if folder.is_dir() else None
            if rows := completed_rows(dict(manifest or {}), str(folder / task / MANIFEST)):
                each.setdefault(arm.name, []).append(f"{arm.name}, {completion_note(task, rows)}.")
    told = [text for texts in each.values() for text in texts]
    brief = f"{plural(len(told), 'adapter')} of {', '.join(each)} start from rows that the method had to complete (more samples may help)."
    return Remark(brief, told)


def _cut(layout: Layout) -> Remark:
    told = [f"{text[0].upper()}{text[1:]}." for text in sentences(layout.cuts, layout.tasks)]
    return Remark(_cut_in_short(layout.cuts) if told else "", told)


def _cut_in_short(cuts: Mapping[str, Mapping[str, Cut]]) -> str:
    """How many tasks have rows that are cut, and which has most.

    >>> _cut_in_short(
    ...     {"a": {"train": Cut(100, 3, 40, 50)}, "b": {"train": Cut(9, 0, 40, 20), "validation": Cut(60, 12, 40, 77)}}
    ... )
    'Rows of 2 tasks are cut at 40 tokens, most often those of b (12 of 60 validation rows); data.max_length: 80 would hold all.'
    """
    cut = {(task, split): c for task, both in cuts.items() for split, c in both.items() if c.cut}
    (task, split), most = max(cut.items(), key=lambda item: item[1].cut / item[1].rows)
    longest, rooms = max(c.longest for c in cut.values()), [c.room for c in cut.values() if c.room is not None]
    sampled = " that were looked at" if any(c.total is not None for c in cut.values()) else ""
    cure = f"data.max_length: {whole_length(longest)} would hold all{sampled}"
    if rooms and whole_length(longest) > min(rooms):
        cure = f"the longest has {longest}, and the base reads {min(rooms)}"
    kind = "training" if split == "train" else split
    tasks = plural(len({name for name, _ in cut}), "task")
    share = f"{most.cut:,} of {most.rows:,} {kind} rows"
    return f"Rows of {tasks} are cut at {most.limit} tokens, most often those of {task} ({share}); {cure}."
