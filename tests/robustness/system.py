"""The table of bad inputs: what the system does; and where the rest of the list is tested."""

# ruff: noqa: E501 (a row is a line)
from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from plait.disk.locks import locked
from tests.conftest import unprivileged
from tests.robustness.cases import MERGE
from tests.robustness.world import Case, umask


def fails(owner: str, error: BaseException):
    """While it runs, something raises."""

    def around(world: Path):
        def fail(*_: object, **__: object) -> None:
            raise error

        return patch(owner, fail)

    return around


@contextlib.contextmanager
def read_only(world: Path) -> Iterator[None]:
    (world / "shut").mkdir(exist_ok=True)
    with unprivileged(world / "shut", 0o555):
        yield


@contextlib.contextmanager
def narrow(world: Path) -> Iterator[None]:
    with patch.dict(os.environ, {"COLUMNS": "40", "LC_ALL": "C", "TERM": "dumb"}):
        yield


def spaces(world: Path) -> None:
    (world / "A").rename(world / "Ä b")


def as_schema(number: object):
    def change(world: Path) -> None:
        (world / "A" / "plait.json").write_text(f'{{"schema": {number}, "result": {{}}}}')

    return change


SYSTEM = [
    Case("46 Ctrl-C", lambda w: None, MERGE, 130, ("interrupted", "run the same command again"),
         fails("plait.merging.folders.write_adapter", KeyboardInterrupt())),
    Case("47 a full disk", lambda w: None, MERGE, 4, ("No space left", "free some space"),
         fails("plait.adapters.tensor_file.os.pwrite", OSError(errno.ENOSPC, "No space left on device"))),
    Case("48 an output that exists", lambda w: (w / "out").mkdir() or (w / "out" / "mine").write_text("x"), MERGE, 2, ("out", "choose another --out")),
    Case("48 an output that is a file", lambda w: (w / "out").write_text("x"), MERGE, 2, ("out", "choose another --out")),
    Case("49 another process writes it", lambda w: None, MERGE, 4, ("another process", "wait for it"), lambda w: locked(w / "out")),
    Case("50 no memory for a file", lambda w: None, MERGE, 4, ("free some memory",),
         fails("plait.adapters.file_bytes.own_block", OSError(errno.ENOMEM, "Cannot allocate memory"))),
    Case("51 no GPU", lambda w: None, (*MERGE, "--device", "cuda"), 4, ("no GPU that torch can use", "--device cpu"),
         lambda w: patch("torch.cuda.is_available", return_value=False)),
    Case("53 a narrow terminal, no locale", lambda w: None, MERGE, 0, (), narrow, new=("out",)),
    Case("54 spaces and non-ASCII in paths", spaces, ("merge", "x=Ä b", "B", "--out", "aus gäbe"), 0, (), new=("aus gäbe",)),
    Case("55 umask 077", lambda w: None, MERGE, 0, (), lambda w: umask(0o077), new=("out",)),
    Case("57 a newer schema", as_schema(99), MERGE, 3, ("A/plait.json", "schema 99", "this plait reads")),
    Case("57 an older schema", as_schema('"0"'), MERGE, 3, ("A/plait.json", "schema 0", "this plait reads")),
    Case("58 a missing extra", lambda w: None, MERGE, 4, ("not installed", "pip install"),
         fails("plait.merging.folders.write_adapter", ModuleNotFoundError("No module named 'cake'", name="cake"))),
]  # fmt: skip

# Numbers of the list that need a model, several processes or a kill: the file and the test that hold them.
ELSEWHERE = {
    29: ("tests/formats/test_fused.py", "fused"),
    38: ("tests/tasks/test_rows.py", "def test_files_that_are_refused"),
    39: ("tests/tasks/test_rows.py", "def test_39_labels_that_disagree"),
    40: ("tests/tasks/test_rows.py", "def test_files_that_are_refused"),
    41: ("tests/tasks/test_encoding.py", "def test_padding_side"),
    42: ("tests/statistics/test_collect.py", "def test_a_module_called_twice_adds_up_and_one_never_called_is_named"),
    43: ("tests/statistics/test_collect.py", "def test_nan_names_module_and_batch"),
    44: ("tests/statistics/test_distributed.py", "def test_uneven_ranks_factors_and_sharded_weights"),
    45: ("tests/training/test_kill.py", "kill"),
    52: ("tests/test_cli_surroundings.py", "def test_52_offline"),
    56: ("tests/statistics/test_distributed.py", "def test_56_a_dead_rank"),
}
