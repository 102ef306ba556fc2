"""The tables that have a colour for each number: every task under every arm and merge, and predicted shifts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

from plait.border.counts import plural
from plait.report.account import Account, TaskRow
from plait.report.table import Row, mean
from plait.report.words import NONE, Cell, Table, percent

__all__ = ["grid_table", "heat_tables", "merge_table"]
_DEEPEST = 20.0  # points lost or won that have the deepest colour
_ROOMY = 6  # tasks whose metric and rows have room at the head of a column
_DECADES = 1e4  # between the palest and the deepest colour of a map, at most
GRID_NOTE = (
    "Rows *alone*: each task by the arm's own adapter; *floor*: by the base with the arm's heads and no adapter. Orange: points"
    f" lost against the arm's own adapter, blue: points won; deepest from {_DEEPEST:z.0f} points on. `*`: a scale on the edge of"
    " what was tried."
)


def merge_table(account: Account) -> Table:
    """Put every arm into a row and every merge into a column: what is recovered of plain, percent."""
    rows: list[Sequence[str | Cell]] = []
    for arm in (b.arm for b in account.best):
        cells = []
        for merge in account.merges:
            mine = account.of(arm, merge)
            share = mean(r.recovered for r in mine) if mine else math.nan
            edge = "*" if any(r.edge for r in mine) and math.isfinite(share) else ""
            tint = max(0.0, min(1.0, share)) if math.isfinite(share) else None
            cells.append(Cell(percent(share) + edge, tint=tint, key=_key(share)))
        rows.append([f"`{arm}`", *cells])
    return Table(("arm", *account.merges), rows, caption="Recovered of plain, %, mean over seeds.", kind="wide")


def grid_table(account: Account) -> Table:
    """Put every arm and merge into a row and every task into a column, with intervals; the best row stands out."""
    tasks = list(account.measured)
    header: list[str | Cell] = [
        "arm, merge",
        Cell("recovered", "% of plain"),
        Cell("of own", "%"),
        Cell("mean", "score"),
    ]
    scored = {t: f"{' + '.join(m.metrics)}, {plural(m.rows, 'row')}" for t, m in account.measured.items()}
    wide = len(tasks) > _ROOMY  # then what a score is stands below
    named = [Cell(t, "" if wide else what) for t, what in scored.items()]
    rows: list[Sequence[str | Cell]] = []
    shares: list[float] = []
    for arm in (b.arm for b in account.best):
        mine = {t.task: t for t in account.tasks if t.arm == arm}
        merges = [(m, of) for m in account.merges if (of := account.of(arm, m))]
        for merge, of in sorted(merges, key=lambda pair: -mean(r.merged for r in pair[1])):
            share = mean(r.recovered for r in of)
            shares.append(share if math.isfinite(share) else mean(r.merged for r in of))
            cells: list[str | Cell] = [_merged(mine.get(t), merge) for t in tasks]
            rows.append([Cell(f"`{arm}`", merge), *_shares(account, of), *cells, _scales(of)])
        for kind in ("alone", "floor"):
            values = [getattr(mine[t], kind) if t in mine else None for t in tasks]
            texts = [NONE if v is None else f"{v:z.1f}" for v in values]
            score = f"{mean(v for v in values if v is not None):z.1f}"
            rows.append([Cell(f"`{arm}`", kind), NONE, NONE, score, *texts, NONE])
            shares.append(-math.inf)
    best = frozenset({max(range(len(shares)), key=lambda i: shares[i])}) if shares else frozenset()
    sure = f" Beneath a score its 95 % interval, of {account.resamples} resamples of seeds and examples."
    caption = "Scores in percent, means over seeds and halves." + (sure if _is_resampled(account) else "")
    note = GRID_NOTE + (f" Scores: {'; '.join(f'{t} {what}' for t, what in scored.items())}." if wide else "")
    return Table((*header, *named, Cell("scale", "chosen")), rows, note, caption, "wide", best)


def _is_resampled(account: Account) -> bool:
    return any(i for t in account.tasks for i in t.intervals.values())


def _shares(account: Account, rows: Sequence[Row]) -> tuple[Cell, Cell, Cell]:
    spread = account.spread(rows[0])
    share, own = mean(r.recovered for r in rows), mean(r.recovered_of_own for r in rows)
    score = mean(r.merged for r in rows)
    return (
        Cell(percent(share), f"± {percent(spread.recovered)}" if spread.recovered else "", key=_key(share)),
        Cell(percent(own), key=_key(own)),
        Cell(f"{score:z.1f}", f"± {spread.merged:z.1f}" if spread.merged else "", key=score),
    )


def _key(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _merged(task: TaskRow | None, merge: str) -> Cell | str:
    if task is None or (score := task.merged.get(merge)) is None:
        return NONE
    interval = task.intervals.get(merge)
    change = (score - task.alone) / _DEEPEST
    note = f"{interval[0]:z.1f}–{interval[1]:z.1f}" if interval else ""
    return Cell(f"{score:z.1f}", note, max(-1.0, min(1.0, change)), score)


def _scales(rows: Sequence[Row]) -> Cell:
    scales = sorted({s for r in rows for s in r.scales})
    ends = dict.fromkeys(f"{s:.3g}" for s in (scales[0], scales[-1]))
    return Cell("–".join(ends) + "*" * any(r.edge for r in rows), key=mean(scales))


def heat_tables(shifts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Table]:
    """Draw predicted output shifts as a map of numbers for each arm, all with the same logarithmic colours.

    Args:
        shifts: Arm -> whose adapter -> whose inputs -> relative shift; NaN where nobody knows.
    """
    known = [v for by in shifts.values() for row in by.values() for v in row.values() if math.isfinite(v) and v > 0]
    top = max(known, default=1.0)
    low = max(min(known, default=0.1), top / _DECADES)

    def cell(value: float) -> Cell:
        if not math.isfinite(value):
            return Cell(NONE)
        tint = math.log(max(value, low) / low) / math.log(top / low) if top > low else 0.5
        return Cell(_shift(value), tint=tint, key=value)

    tables = []
    for arm, by in shifts.items():
        own = [by[t][t] for t in by if math.isfinite(by[t][t])]
        others = [by[i][j] for i, j in product(by, by) if i != j and math.isfinite(by[i][j])]
        means = [f"{what} {_shift(mean(of))}" for what, of in (("own task", own), ("other tasks", others)) if of]
        caption = f"`{arm}`: {', '.join(means)}"
        rows = [(Cell(i), *(cell(v) for v in row.values())) for i, row in by.items()]
        tables.append(Table(("adapter ↓ inputs →", *by), rows, caption=caption, kind="heat"))
    return tables


def _shift(value: float) -> str:
    return f"{value:z.2f}" if value >= 0.1 else f"{value:.1g}"
