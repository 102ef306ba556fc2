"""The diagonal Fisher information of a trained adapter's task, to a file: what Fisher merging weighs entries by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from plait.adapters.lora import LINEAR, Adapter
from plait.border.checked import Json
from plait.border.records import optional
from plait.disk.overwriting import require_apart, require_replaceable_file
from plait.disk.store import identity
from plait.errors import InputError, UsageError
from plait.model.applied import applied, in_backbone
from plait.model.base import load_head
from plait.model.identity import base_facts
from plait.recipes.recipe import Settings
from plait.runs.lengths import say_of_rows
from plait.runs.session import Session
from plait.statistics.fisher import collect_fisher, is_fisher, is_wanted_fisher, read_fisher, write_fisher
from plait.tasks import batches, encode, require_positions, to_device
from plait.tasks.lengths import Cut


@dataclass(frozen=True, slots=True)
class FisherFile:
    """A Fisher diagonal in a file.

    Args:
        output: The file, absolute.
        task: Its task.
        examples: Rows that were read.
        modules: How many modules it is of.
        bytes: Size of the file.
        reused: Whether the file was there already.
        cut: What `data.max_length` took from the rows; None where it took nothing, or the file was there already.
    """

    output: str
    task: str
    examples: int
    modules: int
    bytes: int
    reused: bool = False
    cut: Cut | None = optional(kind=Cut)


def fisher_of_folder(
    settings: Settings,
    folder: str,
    task: str,
    out: Path,
    *,
    labels: Literal["sampled", "given"] = "sampled",
    seed: int = 0,
    overwrite: bool = False,
) -> FisherFile:
    """Collect the Fisher diagonal of one adapter on training rows of its task, and write it.

    Args:
        settings: Base, data, tasks; `statistics.samples` rows are looked at.
        folder: The trained adapter, with its head, ``DIR`` or ``NAME=DIR``.
        task: Which of the recipe's tasks.
        out: The file, ``TASK.fisher.safetensors``.
        labels: See `plait.statistics.fisher.collect_fisher`.
        seed: Of the sample of rows, and of the labels that are drawn.
        overwrite: Replace what stands at `out`.

    Raises:
        UsageError: A task whose predictions are no distribution over classes or tokens (regression), or one that reads
            and writes apart (seq2seq).
        InputError: The adapter carries no head of the task, or adapts an embedding.

    Cost: one forward and one backward pass of the rows; a dense float32 matrix per module.
    """
    from plait.merging.folders import read_named
    from plait.options import require_known

    require_apart(out, [folder if Path(folder).exists() else folder.partition("=")[2]])
    session = Session(settings)
    require_known(task, list(session.tasks), "task")
    kind = session.tasks[task].kind
    if kind not in ("classification", "causal"):
        raise UsageError(f"Fisher information is of classes or of a decoder's tokens, this is {kind}", where=task)
    given = read_named(folder)
    wanted = identity("fisher", _measured(session, task, labels), {"adapter": str(given.source["sha256"])}, seed)
    if overwrite:
        require_replaceable_file(out, is_fisher)  # before minutes are spent on it
    elif is_wanted_fisher(out, wanted):
        before = read_fisher(out)
        return FisherFile(
            str(out.absolute()), task, before.examples, len(before.modules), out.stat().st_size, reused=True
        )
    evaluator = session.evaluator
    model = evaluator.task_model(task)
    adapter = _ready(given, model, task, kind)
    examples = session.sample(task, seed)
    cut = say_of_rows(session, task, examples, split="train")
    rows = encode(evaluator.tokenizer, session.tasks[task], examples, settings.data.max_length)
    require_positions(model, (len(r["input_ids"]) for r in rows), f"task {task}")
    device = session.base.torch_device
    parts = (to_device(b, device) for b in batches(evaluator.tokenizer, rows, settings.statistics.batch_size))
    with applied(model, adapter):
        diagonal = collect_fisher(
            model, parts, list(adapter.modules), labels=labels, generator=torch.Generator().manual_seed(seed)
        )
    facts = {**diagonal.provenance, **_facts(session, task, adapter)}
    write_fisher(out, replace(diagonal, provenance=facts), identity=wanted, overwrite=overwrite)
    size, cut_off = out.stat().st_size, cut if cut.cut else None
    return FisherFile(str(out.absolute()), task, diagonal.examples, len(diagonal.modules), size, cut=cut_off)


def _measured(session: Session, task: str, labels: str) -> Json:
    """What the diagonal depends on, besides the adapter and the seed."""
    settings = session.recipe
    return {
        "base": session.base_sha256,
        "dtype": settings.base.dtype,
        "data": session.data_identity(task),
        "max_length": settings.data.max_length,
        "samples": settings.statistics.samples,
        "labels": labels,
        # What is drawn for a row depends on the rows and the pads drawn for before it.
        **({"batch_size": settings.statistics.batch_size} if labels == "sampled" else {}),
    }


def _ready(adapter: Adapter, model: Any, task: str, kind: str) -> Adapter:
    """The adapter as the model names its modules, its head in the model."""
    if odd := [m for m, f in adapter.modules.items() if f.kind != LINEAR]:
        raise InputError("Fisher diagonals are of linear layers", where=f"{adapter.name}: {odd[0]}")
    if kind == "classification":
        name = task if task in adapter.heads or len(adapter.heads) != 1 else next(iter(adapter.heads))
        if name not in adapter.heads:
            raise InputError(f"it carries no head of task {task!r}", where=adapter.name, hint="the trained folder")
        adapter.require_of_texts(name)
        load_head(model, adapter.heads[name])
    return in_backbone(model, adapter)


def _facts(session: Session, task: str, adapter: Adapter) -> Json:
    return {
        "task": task,
        "base": session.base.name,
        **base_facts(session.base),
        "adapter_sha256": adapter.source.get("sha256"),
    }
