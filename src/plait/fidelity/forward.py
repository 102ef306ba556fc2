"""`plait merge BASE ADAPTER... --method featcal | regmean_pp | adamerging --text TASK=FILE`: the methods that run the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from plait.adapters.arrays import FLOAT32, KEEP
from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.border.records import to_json
from plait.disk import store
from plait.disk.overwriting import require_apart
from plait.disk.space import require_space
from plait.disk.written import Written, reused
from plait.errors import InputError, UsageError
from plait.fidelity.arguments import recorded_base
from plait.fidelity.panel import Panel, Part, parts_of
from plait.fidelity.texts import Texts, checked
from plait.fidelity.tokens import cut_notes, require_room, rows_of
from plait.formats.convert import written_error
from plait.formats.keys import PEFT
from plait.formats.reading import format_of
from plait.formats.writing import finished, write_any
from plait.merging.folders import places, read_all
from plait.merging.methods.adamerging import adamerging
from plait.merging.methods.featcal import featcal
from plait.merging.methods.regmean_pp import regmean_pp
from plait.merging.record import Merged, MergeRecord, input_hashes
from plait.merging.rounding import dtype_for, in_dtype
from plait.model.base import BaseModel
from plait.model.identity import held_fingerprint
from plait.options import Fraction, Option, Positive, Range, checked_options, options_of
from plait.progress import OnProgress
from plait.tasks import batches


# What --set may say of each: the functions' own keyword-only parameters hold more than options.
def _regmean_pp(*, alpha: Fraction = 0.9, normalised: bool = True) -> None: ...


def _adamerging(
    *,
    init: float = 0.3,
    learning_rate: Positive = 1e-3,
    steps: Annotated[int, Range(0)] = 500,
    layerwise: bool = True,
    clamp: bool = True,
) -> None: ...


def _featcal(
    *,
    own: Fraction = 1.0,
    pull: Positive = 0.01,
    reach: Positive | None = None,
    scale: Positive | None = None,
    rank: Annotated[int, Range(1)] | None = None,
    anchor: str = "tsv",
) -> None: ...


@dataclass(frozen=True, slots=True)
class ForwardMethod:
    """A method that needs forward passes, as the command line knows it.

    Args:
        name: What `--method` takes.
        function: Function of (adapters, model, forward, batches), options, base and name.
        paper: Where it comes from.
        options: Name -> option.
    """

    name: str
    function: Callable[..., Merged]
    paper: str
    options: Mapping[str, Option]


METHODS = {
    "featcal": ForwardMethod("featcal", featcal, "arXiv:2605.13030", options_of(_featcal)),
    "regmean_pp": ForwardMethod("regmean_pp", regmean_pp, "arXiv:2508.03121", options_of(_regmean_pp)),
    "adamerging": ForwardMethod("adamerging", adamerging, "arXiv:2310.02575", options_of(_adamerging)),
}


def merge_by_forward(
    folders: Sequence[str],
    out: Path,
    method: str,
    *,
    base: BaseModel | None,
    texts: Mapping[str, Texts],
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    base_id: str | None = None,
    max_length: int = 128,
    batch_size: int = 32,
    dtype: str = KEEP,
    four_bits: str | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = lambda _: None,
) -> Written[MergeRecord]:
    """Merge PEFT folders by a method that runs the base on unlabelled texts, on the CPU.

    Args:
        folders: ``DIR`` or ``NAME=DIR`` each; every adapter with one head, or of a text model.
        out: The folder to write; a finished one of the same identity is kept.
        method: "featcal", "regmean_pp" or "adamerging" (classifiers only).
        base: None where all adapters name one folder on this machine.
        texts: Task -> its texts.
        options: Options of the method.
        weights: One per adapter; adamerging takes none, it learns them.
        base_id: Base id of the result where the adapters name one base by different names.
        max_length: Tokens a text.
        batch_size: Texts a pass.
        dtype: Type of the written factors, see `plait.merging.folders.merge_folders`.
        four_bits: How a base is held that was not given, see `BaseModel`.
        overwrite: Replace what stands at `out`.
        on_progress: Called with what a person should know before the base runs.

    Returns:
        The record of the merge, and where it was written.

    Raises:
        UsageError: No base or no texts, weights for adamerging, options that are unknown or out of range.
        InputError: Adapters with several heads, of encoder-decoder models, of text models where entropy is asked for, or in
            another format.
    """
    found, adapters = METHODS[method], read_all(folders)
    require_apart(out, places(adapters))
    chosen = checked_options(found, options)
    panel = _panel(
        method, adapters, base or recorded_base(adapters, "cpu", four_bits=four_bits), texts, batch_size, max_length
    )
    if weights is not None and method == "adamerging":
        raise UsageError("adamerging learns the weights", hint="leave --weights out, or --set init=0.5")
    settings = {"method": method, "options": chosen, "weights": list(weights or ()), "base": base_id}
    inputs = input_hashes(adapters)
    inputs |= {f"texts:{t}": store.sha256_json(rows) for t, rows in panel.texts.items()}
    inputs["base"] = held_fingerprint(panel.base)
    passes = {"max_length": max_length, "batch_size": batch_size, "order": [a.name for a in adapters]}
    kind = dtype_for(dtype, adapters)
    settings |= {} if kind == FLOAT32 else {"dtype": kind}
    wanted = store.identity("merge-forward", settings | passes, inputs)
    if (before := finished(out, wanted, overwrite=overwrite)) is not None:
        return reused(out, before, MergeRecord)
    more = {} if method == "adamerging" else {"weights": weights}
    notes = tuple(cut_notes(panel))
    for note in notes:
        on_progress(note)
    require_room(panel)
    if "rank" not in chosen or chosen["rank"] is None:
        require_space(out, max(a.nbytes for a in adapters))
    done = _run(found.function, panel, adapters, **chosen, **more, base=base_id, name=out.name)
    adapter, took = in_dtype(done.adapter, kind, adapters)
    record = replace(took.noted(done.record), texts={t: len(rows) for t, rows in panel.texts.items()}, notes=notes)
    result = to_json(record)

    def check(written: Path) -> None:
        result["verification_error"] = written_error(adapter, written, PEFT)

    write_any(out, adapter, PEFT, wanted, result, overwrite=overwrite, check=check)
    return Written(replace(record, verification_error=result["verification_error"]), str(out))


def _panel(
    method: str,
    adapters: Sequence[Adapter],
    base: BaseModel | None,
    texts: Mapping[str, Texts],
    batch_size: int,
    max_length: int,
) -> Panel:
    """The base with one part for each adapter, everything checked."""
    if base is None:
        raise UsageError(f"{method} runs the base model, and none was given", hint="its folder or name comes first")
    if not texts:
        raise UsageError(f"{method} reads texts, and there are none", hint="--text TASK=FILE for every adapter")
    if other := next((a.name for a in adapters if format_of(a) != PEFT), None):
        raise InputError("no PEFT folder", where=other, hint="plait convert --to peft")
    parts = parts_of(adapters)
    for adapter in adapters:
        mine = [p for p in parts if p.adapter is adapter]
        if len(mine) != 1:
            raise InputError(
                f"{plural(len(mine), 'head')}, and {method} takes adapters of one task", where=adapter.name
            )
        if mine[0].task.kind == "seq2seq":
            raise InputError(
                "of an encoder-decoder model, whose two kinds of padding are not told apart", where=adapter.name
            )
        if method == "adamerging" and mine[0].task.kind != "classification":
            raise InputError(
                f"a task of {mine[0].task.kind}: the entropy of its predictions says little about it",
                where=adapter.name,
                hint="adamerging is for classifiers; --method featcal takes any",
            )
    ready = {t: checked(rows, f"texts of {t}") for t, rows in texts.items()}
    return Panel(replace(base, device="cpu"), parts, ready, (), batch_size, max_length)


def _run(function: Callable[..., Merged], panel: Panel, adapters: Sequence[Adapter], **given: Any) -> Merged:
    """The method on the panel's texts; all tasks' models share the modules that are merged."""
    parts = {p.adapter.name: p for p in panel.parts}
    models = {name: panel.model(part) for name, part in parts.items()}

    def forward(task: str, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = models[task](**batch).logits
        return logits

    read = {name: _batches(panel, part) for name, part in parts.items()}
    return function(adapters, models[adapters[0].name], forward, read, **given)


def _batches(panel: Panel, part: Part) -> list[dict[str, Tensor]]:
    made = batches(panel.tokenizer, rows_of(panel, part), panel.batch_size)
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in made]
