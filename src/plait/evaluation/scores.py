"""The long table: one row a number, from evaluation to report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ALONE, FLOOR, MERGED = "alone", "floor", "merged"
SELECTION, REPORTED = "selection", "reported"


@dataclass(frozen=True, slots=True)
class Score:
    """One number.

    Args:
        arm: How A was initialised and kept; "" where adapters came from elsewhere.
        adapter: "alone" (a task's own adapter), "floor" (the base with that task's head) or "merged".
        method: The merge's name; "" for alone and floor.
        scale: Multiple of the merged delta; 1 for alone, 0 for floor.
        task: Name of the task whose examples and head were used.
        metric: Name of the metric, or "score" for the mean of the task's metrics.
        value: The number, in percent.
        n: Number of examples.
        seed: The run's seed.
        split: "selection" or "reported" half of the validation rows.
    """

    arm: str
    adapter: str
    method: str
    scale: float
    task: str
    metric: str
    value: float
    n: int
    seed: int
    split: str


def write_scores(path: Path, rows: Iterable[Score]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(asdict(r), sort_keys=True) + "\n" for r in rows), encoding="utf-8")


def are_scores(path: Path) -> bool:
    """Whether a file begins as `write_scores` begins one."""
    with path.open("rb") as file:
        start = file.readline(1 << 16)
    try:
        Score(**json.loads(start))
    except (ValueError, TypeError):
        return False
    return True


def write_parquet(path: Path, rows: Sequence[Score]) -> None:
    """Write rows as a parquet table with the columns of `Score`."""
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([asdict(r) for r in rows]), path)


def mean_score(rows: Iterable[Score]) -> float:
    """Mean over tasks of the rows' "score" metric; NaN for none.

    >>> mean_score([]) != mean_score([])  # NaN
    True
    """
    values = [r.value for r in rows if r.metric == "score"]
    return sum(values) / len(values) if values else float("nan")
