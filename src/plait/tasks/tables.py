"""Tables as they lie in files and on the hub, before anything is known of a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.disk.store import require_regular
from plait.errors import EnvironmentFault, InputError

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_HASHED = 4096  # at once
_LINE_LIMIT = 64 << 20  # bytes of one json or csv row that pyarrow may buffer


def read_table(path: Path, text_columns: Sequence[str] = ()) -> pa.Table:
    """Read a csv, tsv, jsonl or parquet file, whole; in csv and tsv the text columns are read as text whatever they hold.

    Raises:
        InputError: No such file, another kind of file, or a damaged one.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet
    from pyarrow import json as lines

    require_regular(path)
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return parquet.read_table(path)
        if kind in (".jsonl", ".json"):
            return lines.read_json(path, read_options=lines.ReadOptions(block_size=_LINE_LIMIT))
        if kind in (".csv", ".tsv"):
            delimiter = "\t" if kind == ".tsv" else ","
            strings = csv.ConvertOptions(column_types={c: pa.string() for c in text_columns}, strings_can_be_null=False)
            parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
            return csv.read_csv(path, csv.ReadOptions(block_size=_LINE_LIMIT), parse, strings)
    except (pa.ArrowException, OSError) as e:
        raise InputError(
            f"cannot be read: {str(e).splitlines()[0]}", where=str(path), hint="UTF-8, one row a line"
        ) from None
    raise InputError(f"unknown kind of file {kind!r}", where=str(path), hint="csv, tsv, jsonl or parquet")


def as_written(path: Path, table: pa.Table, column: str) -> pa.Table:
    """Give a column of numbers, or of true and false, of a csv or tsv file as its cells are spelled; other tables as they are.

    A single 3.5 makes floats of a column, in which 72 would read 72.0, and in another file of the same rows 72.

    Args:
        path: The file.
        table: What `read_table` gave of it.
        column: Name of the column.
    """
    import pyarrow as pa
    from pyarrow import compute

    if path.suffix.lower() not in (".csv", ".tsv") or table.column_names.count(column) != 1:
        return table
    cells: Any = table[column]
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    if not any(is_kind(cells.type) for is_kind in kinds):
        return table
    compute_: Any = compute
    spelled = compute_.utf8_trim_whitespace(read_table(path, (column,))[column])
    known = compute_.if_else(compute_.is_valid(cells), spelled, pa.scalar(None, pa.string()))
    return table.set_column(table.column_names.index(column), column, known)


def hub_table(place: str, where: str) -> pa.Table:
    """Load a data set of the hub, whole.

    Args:
        place: "hub:NAME[@REVISION][:CONFIG[:SPLIT]]"; the split is "train" where none is named, the revision the newest.
        where: What an error names.

    Raises:
        EnvironmentFault: It cannot be loaded.
    """
    from datasets import load_dataset

    named, config, split, *_ = [*place.removeprefix("hub:").split(":"), "", ""]
    name, _, revision = named.partition("@")
    try:
        data = load_dataset(name, config or None, split=split or "train", revision=revision or None)
    except Exception as e:  # the hub client raises many unrelated types
        first = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise EnvironmentFault(
            f"cannot load {place}: {first}", where=where, hint="offline? name local files instead"
        ) from e
    return data.with_format("arrow")[:]


def rows_sha256(table: pa.Table) -> str:
    """Hash the rows of a table, however they lie in memory: a name on the hub may stand for others tomorrow.

    Cost: half a second for 400,000 rows of two sentences.
    """
    digest = hashlib.sha256(json.dumps([table.column_names, table.num_rows]).encode())
    for start in range(0, table.num_rows, _ROWS_HASHED):
        digest.update(json.dumps(table.slice(start, _ROWS_HASHED).to_pydict(), default=str).encode())
    return digest.hexdigest()
