"""Statistics of a task's rows, to a file: within a memory budget, or in shards that an interruption does not lose."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from plait.border.checked import Json
from plait.border.records import to_json
from plait.disk.files import require_regular
from plait.disk.locks import locked, system_errors
from plait.disk.manifest import require_wanted
from plait.disk.store import sha256_json
from plait.errors import Damaged, InputError
from plait.model.identity import base_facts, tokenizer_fingerprint
from plait.model.ranks import is_writer, rank, together
from plait.runs.output_gradients import beside
from plait.runs.session import Session
from plait.statistics import (
    Statistics,
    collect_shards,
    collect_statistics,
    open_statistics,
    read_identity,
    write_statistics,
)
from plait.statistics.budget import bytes_of
from plait.statistics.distributed import own_share
from plait.statistics.files import HOLDS
from plait.tasks import Task, batches, require_positions
from plait.tasks.encoding import encode_counted
from plait.tasks.lengths import Cut

# Rows of a shard: some minutes of a large model on one GPU.
SHARD_ROWS = 1024


def collect_file(
    session: Session, name: str, path: Path, *, seed: int, wanted: Mapping[str, Any], overwrite: bool = False
) -> None:
    """Collect a task's statistics and write them.

    More than `SHARD_ROWS` rows are collected shard by shard into a hidden folder beside the file; whoever asks for the
    same file again after an interruption goes on after the last finished shard. With a memory budget the folder takes
    finished groups of layers instead. Under torchrun every process reads its share and keeps a folder of its own; the
    first one writes the file.

    Args:
        session: Base, data, settings.
        name: Of the task.
        path: The file.
        seed: Of the sample of rows.
        wanted: The file's identity.
        overwrite: Replace it.
    """
    task = session.tasks[name]
    examples = session.sample(name, seed)
    own = "" if is_writer() else f".rank-{rank()}"
    parts = path.parent / f".{path.name}.{sha256_json(dict(wanted))[:12]}{own}.parts"
    with (
        together(session.base.torch_device),
        locked(parts, output=path, doing="collecting statistics"),
        system_errors(parts),
    ):
        try:
            statistics = collect_task(session, task, examples, parts=parts, seed=seed)
            if is_writer():
                write_statistics(path, statistics, identity=wanted, overwrite=overwrite)
        finally:
            if session.recipe.statistics.memory is not None:  # groups of layers cannot be gone on with
                shutil.rmtree(parts, ignore_errors=True)
    if is_writer():
        for leftover in path.parent.glob(f".{path.name}.*.parts"):
            shutil.rmtree(leftover, ignore_errors=True)


def is_collected(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a statistics file is there, every byte as it was written, and made with the same settings.

    Raises:
        UsageError: It was made with others.
        Damaged: It was changed since.
    """
    if not path.exists():
        return False
    require_regular(path)
    try:
        identity = read_identity(path)
        statistics = open_statistics(path)
        for moments in chain(statistics.sites.values(), statistics.output_gradients.values()):
            del moments  # each is compared with its hash as it is read
    except InputError as e:
        raise Damaged(e.what, where=e.where, hint="--overwrite, or delete it: then it is made anew") from None
    known = None if identity is None else {k: v for k, v in identity.items() if k != HOLDS}
    require_wanted(path, known, wanted)
    return True


def collect_task(session: Session, task: Task, examples: Any, *, parts: Path, seed: int) -> Statistics:
    """Statistics of one task's rows at the recipe's target modules.

    Args:
        session: Base and settings.
        task: The task.
        examples: Its rows.
        parts: Where shards or groups of layers go; what is returned may be read from there.
        seed: Of the heads and answers that output gradients are drawn with.
    """
    recipe, evaluator = session.recipe, session.evaluator
    rows, cut = encode_counted(evaluator.tokenizer, task, examples, recipe.data.max_length)
    spec, tokenizer = recipe.statistics, evaluator.tokenizer
    model, targets = evaluator.task_model(task.name), recipe.adapted.target_modules
    require_positions(model, (len(r["input_ids"]) for r in rows), f"task {task.name}")
    options: dict[str, Any] = {"pool": spec.pool, "sketch": spec.sketch, "provenance": _provenance(session, task, cut)}
    options |= recipe.adapted.limits

    def given(start: int, stop: int | None) -> Any:
        return own_share(batches(tokenizer, rows[start:stop], spec.batch_size, by_length=True))

    def with_gradients(start: int, stop: int | None, moments: Statistics) -> Statistics:
        if not spec.output_gradients:
            return moments
        return beside(moments, session, task, rows[start:stop], seed, first=start)

    if spec.memory is not None:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        return collect_statistics(
            model, given(0, None), targets, memory=bytes_of(str(spec.memory)), spool=parts, **options
        )
    if len(rows) <= SHARD_ROWS:
        return with_gradients(0, None, collect_statistics(model, given(0, None), targets, **options))
    starts = range(0, len(rows), SHARD_ROWS)
    shards = [lambda s=s: given(s, s + SHARD_ROWS) for s in starts]
    return collect_shards(
        model,
        shards,
        parts,
        targets,
        beside=lambda n, moments: with_gradients(starts[n], starts[n] + SHARD_ROWS, moments),
        **options,
    )


def _provenance(session: Session, task: Task, cut: Cut) -> Json:
    recipe = session.recipe
    return {
        "base": session.base.name,
        **base_facts(session.base),
        "revision": session.base.revision,
        "tokenizer_sha256": tokenizer_fingerprint(session.evaluator.tokenizer),
        "task": task.name,
        "max_length": recipe.data.max_length,
        "dtype": session.base.dtype,
        "template": task.template,
        **({"cut": to_json(cut)} if cut.cut else {}),
    }
