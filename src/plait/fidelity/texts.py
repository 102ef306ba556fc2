"""Unlabelled texts: read from files, one tuple of one or two strings a text."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.border.counts import plural
from plait.disk.store import require_regular
from plait.errors import InputError, UsageError
from plait.tasks.chat import packed_prompt
from plait.tasks.tables import read_table

Texts = tuple[tuple[str, ...], ...]
Rows = Sequence[str | Sequence[str]]  # texts as a program may give them: a single one need not be a tuple
_NAMES = ("text", "sentence", "prompt", "messages", "content")  # the first of these is read where no column is named
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
# Texts of a file that a choice reads, and those that what comes after it reads: a repair, heads, the measure.
LIMIT, LIMIT_OF_REST = 100, 500
# Every fourth text is held out from what is learnt; with fewer texts than this nothing is learnt.
HELD_OUT, FEWEST = 4, 12


@dataclass(frozen=True, slots=True)
class TextFile:
    """Texts of a file, and where they stood in it.

    Args:
        texts: The texts.
        columns: The table's columns that they were read from; () of a .txt file.
        owners: What another column says of each, "" where its cell is empty; () where nobody asked for one, or the file has none.
        total: Texts that the file holds.
    """

    texts: Texts
    columns: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    total: int = 0


def parse_texts(given: Iterable[str]) -> dict[str, Texts]:
    """``TASK=FILE`` or ``TASK=FILE:COLUMN[,COLUMN]`` each, read; see `parse_files`."""
    return {task: file.texts for task, file in parse_files(given).items()}


def parse_files(given: Iterable[str], limit: int = LIMIT) -> dict[str, TextFile]:
    """``TASK=FILE`` or ``TASK=FILE:COLUMN[,COLUMN]`` each, read from all over the file (`spread_over`).

    Raises:
        UsageError: Not of that form, or a task twice.
    """
    texts: dict[str, TextFile] = {}
    for item in given:
        task, equals, place = item.partition("=")
        if not equals or not task or not place:
            raise UsageError(f"--text {item!r} is not TASK=FILE", hint="the task is the adapter's name")
        if task in texts:
            raise UsageError(f"--text names {task!r} twice")
        texts[task] = read_file(place, limit, spread=True)
    return texts


def read_place(place: str, limit: int = LIMIT, *, spread: bool = False) -> Texts:
    """Texts of ``FILE`` or ``FILE:COLUMN[,COLUMN]``."""
    return read_file(place, limit, spread=spread).texts


def read_file(place: str, limit: int = LIMIT, *, spread: bool = False, by: str = "") -> TextFile:
    """Texts of ``FILE`` or ``FILE:COLUMN[,COLUMN]``, and the columns that were read.

    Args:
        place: The file: .txt (one text a line, a tab between the two of a pair) or csv, tsv, jsonl, parquet; and one column or
            two of a table, by default "text", "sentence", "prompt", "messages" or "content", whichever it has. A cell of
            messages is packed (`plait.tasks.chat.packed_prompt`).
        limit: How many texts at most; of each owner, where there are owners.
        spread: Whether they come from all over the file (`spread_over`), not from its beginning.
        by: Column that says whose a text is, if the file has it; "" for none.

    Raises:
        InputError: No such file or column, not UTF-8, no texts, an empty cell, pairs and single texts mixed.
    """
    path, colon, columns = place.rpartition(":")
    if colon and not Path(place).exists():
        return _read(Path(path), tuple(columns.split(",")), limit, spread=spread, by=by)
    return _read(Path(place), (), limit, spread=spread, by=by)


def spread_over(count: int, most: int) -> list[int]:
    """Choose places all over a file, in an order of which every beginning is spread too: the first texts decide what reads more of them.

    Many files are sorted by label or by source, and their first hundred rows are of one kind. Places are taken by the fractional part
    of place times golden ratio, the least first: those below any bound lie at three distances at most (the three-gap theorem).

    >>> spread_over(1000, 4), spread_over(5, 8)
    ([0, 610, 233, 843], [0, 2, 4, 1, 3])

    Args:
        count: How many there are.
        most: How many are wanted.
    """
    return heapq.nsmallest(most, range(count), key=lambda i: i * _GOLDEN % (1 << 64))


def _read(path: Path, columns: tuple[str, ...], limit: int, *, spread: bool = False, by: str = "") -> TextFile:
    require_regular(path)
    chosen: tuple[str, ...] = ()
    owners: list[str] = []
    if path.suffix.lower() == ".txt":
        try:
            # Not `splitlines`, for which a form feed or U+2028 inside a text ends it too.
            lines = [line for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
        except UnicodeDecodeError as e:
            raise InputError(f"not UTF-8 at byte {e.start}", where=str(path), hint="save it as UTF-8") from None
        total = len(lines)
        places: Sequence[int] = spread_over(total, limit) if spread else range(min(limit, total))
        rows = [tuple(lines[i].split("\t", 1)) for i in places]
    else:
        table = read_table(path, (*(columns or _NAMES), *filter(None, (by,))))
        chosen, total = _columns(path, columns, table.column_names), table.num_rows
        places = spread_over(total, limit) if spread else range(min(limit, total))
        if by in table.column_names and by not in chosen:
            whose = ["" if x is None else str(x).strip() for x in table[by].to_pylist()]
            places = _first_of_each(whose, limit)
            owners = [whose[i] for i in places]
        cells = (_cells(table[c], places, path) for c in chosen)
        rows = list(zip(*cells, strict=True))
    if not rows:
        raise InputError("no texts", where=str(path))
    return TextFile(checked(tuple(rows), str(path), places), chosen, tuple(owners), total)


def _first_of_each(names: Sequence[str], limit: int) -> list[int]:
    """Places of the first few of each name, in their order.

    >>> _first_of_each(["a", "b", "a", "a", "b"], 2)
    [0, 1, 2, 4]
    """
    counts: Counter[str] = Counter()
    places = []
    for i, name in enumerate(names):
        counts[name] += 1
        if counts[name] <= limit:
            places.append(i)
    return places


def _cells(column: Any, places: Sequence[int], path: Path) -> list[Any]:
    """Cells of a column; messages packed."""
    cells = column.take(list(places)).to_pylist() if places else []
    return [
        packed_prompt(x, f"{path}, row {i}") if isinstance(x, list) else x for i, x in zip(places, cells, strict=True)
    ]


def _columns(path: Path, columns: tuple[str, ...], there: Sequence[str]) -> tuple[str, ...]:
    """The columns to read: those that are named, else the first of the usual ones."""
    chosen = columns or next(((name,) for name in _NAMES if name in there), ())
    missing = [c for c in chosen if c not in there]
    if missing or not chosen:
        raise InputError(
            f"no column {missing[0] if missing else 'text'!r}; there are {', '.join(map(repr, there[:12]))}",
            where=str(path),
            hint="--text TASK=FILE:COLUMN, or FILE:COLUMN,COLUMN for pairs",
        )
    return chosen


def in_rows(texts: Rows) -> Texts:
    """Give every text as a row, a single one as a row of one part.

    >>> in_rows(["a fine film", ("It rains.", "It is wet.")])
    (('a fine film',), ('It rains.', 'It is wet.'))
    """
    return tuple((row,) if isinstance(row, str) else tuple(row) for row in texts)


def checked(texts: Texts, where: str, places: Sequence[int] | None = None) -> Texts:
    """Check that every text is one or two strings that are not blank.

    Args:
        texts: The texts.
        where: What an error names.
        places: Where each stands among those of its file; in their order by default.

    Raises:
        InputError: Otherwise; names the row.
    """
    width = len(texts[0]) if texts else 0
    for i, row in zip(range(len(texts)) if places is None else places, texts, strict=True):
        if len(row) != width or width not in (1, 2):
            raise InputError(
                f"row {i} has {plural(len(row), 'part')}, the first has {width}",
                where=where,
                hint="pairs or single texts",
            )
        blank = [not isinstance(part, str) or not part.strip() for part in row]
        if any(blank):
            pair = width == 2 and not all(blank)
            which = f" in its {'first' if blank[0] else 'second'} part" if pair else ""
            hint = "leave that row out; the first is row 0"
            if pair:
                hint = "pairs and single texts go into files of their own, TASK=FILE each"
            raise InputError(f"row {i} is empty or no text{which}", where=where, hint=hint)
    return texts


def first_of(texts: Mapping[str, Texts], most: int) -> dict[str, Texts]:
    """Take the first texts of each task.

    >>> first_of({"sst2": (("a",), ("b",), ("c",))}, 2)
    {'sst2': (('a',), ('b',))}
    """
    return {task: rows[:most] for task, rows in texts.items()}


def split_off(texts: Mapping[str, Texts]) -> tuple[dict[str, Texts], dict[str, Texts]]:
    """Split each task's texts in two: most of them, and every `HELD_OUT`-th one held out (none where there are too few).

    >>> split_off({"sst2": (("a",), ("b",), ("c",), ("d",))})
    ({'sst2': (('a',), ('b',), ('c',))}, {'sst2': (('d',),)})
    """
    most = {t: tuple(x for i, x in enumerate(rows) if i % HELD_OUT != HELD_OUT - 1) for t, rows in texts.items()}
    return most, {t: rows[HELD_OUT - 1 :: HELD_OUT] for t, rows in texts.items()}
