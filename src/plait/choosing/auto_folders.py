"""`merge auto` from folders to a folder, whose manifest holds the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from plait.adapters.arrays import FLOAT32, KEEP
from plait.adapters.lora import Adapter
from plait.adapters.peft_format import read_adapter
from plait.border.records import from_json, to_json
from plait.choosing.auto import AutoMerge, merge_auto
from plait.choosing.auto_settings import AutoSettings
from plait.disk import store
from plait.disk.overwriting import require_apart
from plait.disk.space import require_space
from plait.disk.written import Written, reused
from plait.errors import EnvironmentFault, PlaitError, RunError
from plait.fidelity.arguments import recorded_base
from plait.fidelity.record import AutoRecord
from plait.fidelity.texts import LIMIT, Texts
from plait.formats.keys import PEFT
from plait.formats.reading import format_of
from plait.formats.single_file import read_lora_file
from plait.formats.writing import finished, in_format, write_any
from plait.learning.checkpoints import NOTHING_KEPT, Checkpoints, checkpoints_beside, remove_beside, state_of
from plait.merging.folders import places, read_all
from plait.merging.record import input_hashes
from plait.merging.rounding import dtype_for, in_dtype
from plait.model.base import BaseModel
from plait.model.identity import held_fingerprint
from plait.progress import OnProgress


def merge_auto_folders(
    folders: Sequence[str],
    out: Path,
    *,
    base: BaseModel | None = None,
    texts: Mapping[str, Texts] | None = None,
    general: Texts = (),
    settings: AutoSettings | None = None,
    base_id: str | None = None,
    dtype: str = KEEP,
    device: str = "auto",
    four_bits: str | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = lambda _: None,
) -> Written[AutoRecord]:
    """`merge_auto` of PEFT folders into a PEFT folder whose manifest holds the evidence.

    With texts, what is done lies beside `out` in ``.NAME.checkpoints`` until the result is written: killed at any moment and started
    again, it goes on from there, on the CPU to the same bits. What lies there of other inputs, settings or versions is let go, and
    that is said. Nothing stays where the result is refused, since it would be refused again.

    Args:
        folders: ``DIR`` or ``NAME=DIR`` each.
        out: The folder to write; a finished one of the same identity is kept.
        base: Needed with texts, but where all adapters name one folder on this machine.
        texts: Texts as `merge_auto` has them; so are the rest.
        general: Texts of no task.
        settings: What is tried.
        base_id: Base id of the result.
        dtype: Type of the written factors, see `plait.merging.folders.merge_folders`.
        device: Where a base runs that was not given.
        four_bits: How such a base is held, see `BaseModel`.
        on_progress: Called with what is being done.
        overwrite: Replace what stands at `out`.

    Returns:
        The record, where the result is, and whether it stood there before.
    """
    chosen = settings or AutoSettings()
    adapters = read_all(folders)
    require_apart(out, places(adapters))
    if texts and base is None and (base := recorded_base(adapters, device, four_bits=four_bits)) is not None:
        on_progress(f"base: {base.name}, as the adapters name it")
    if texts and base is not None:
        on_progress(f"reading the base's files, by which it is known again: {base.name}")
    options = _options(chosen, base_id, dtype_for(dtype, adapters), bool(texts))
    wanted = store.identity("merge-auto", options, _inputs(adapters, base, texts or {}, general), chosen.seed)
    if (before := finished(out, wanted, overwrite=overwrite)) is not None:
        remove_beside(out, wanted)
        return reused(out, before, AutoRecord)
    if chosen.rank is None:
        require_space(out, max(a.nbytes for a in adapters))
    keeping: AbstractContextManager[Checkpoints] = nullcontext(NOTHING_KEPT)
    if texts and len(adapters) > 1:
        identity = state_of(wanted, base, {"texts": chosen.texts, "batch_size": chosen.batch_size})
        room = sum(a.nbytes for a in adapters)
        keeping = checkpoints_beside(out, identity, room, on_progress, overwrite=overwrite)
    with keeping as checkpoints:
        try:
            merge = merge_auto(
                adapters,
                base,
                texts,
                general=general,
                settings=chosen,
                base_id=base_id,
                checkpoints=checkpoints,
                on_progress=on_progress,
            )
        except EnvironmentFault:
            raise
        except PlaitError:
            checkpoints.refused()
            raise
        written = _written(merge, out, adapters, dtype, wanted, overwrite=overwrite)
        checkpoints.remove()
    return written


def _written(
    merge: AutoMerge,
    out: Path,
    adapters: Sequence[Adapter],
    dtype: str,
    wanted: Mapping[str, object],
    *,
    overwrite: bool,
) -> Written[AutoRecord]:
    """Write what was chosen, in the type that is asked for."""
    merged = replace(merge.adapter, name=out.name) if len(adapters) > 1 else merge.adapter
    merged, rounding = in_dtype(merged, dtype, adapters)
    record = merge.record
    if rounding.rounds:
        record = replace(record, dtype=rounding.dtype, rounding_error=rounding.error)
    result = _write(out, merged, record, wanted, overwrite=overwrite, target=format_of(adapters[0]))
    return Written(result, str(out))


def _options(settings: AutoSettings, base_id: str | None, dtype: str, with_texts: bool) -> dict[str, object]:
    """What the result depends on beside its inputs; what came later is named only where it is asked for, so that older folders stay."""
    options: dict[str, object] = {
        "methods": list(settings.methods), "scales": list(settings.scales), "refine": settings.refine, "fit": settings.fit,
        "heads": settings.heads, "max_shift": settings.max_shift, "repair": settings.repair,
        "rank": settings.rank, "max_length": settings.max_length, "base": base_id,
    }  # fmt: skip
    if settings.learn_heads:
        options["learn_heads"] = True
    if settings.repair_from:
        options["repair_from"] = settings.repair_from
    if settings.texts != LIMIT:
        options["texts"] = settings.texts
    if with_texts and (settings.chat or settings.answers is not False):
        options |= {"chat": settings.chat, "answers": settings.answers, "new_tokens": settings.new_tokens}
    if settings.on_policy:
        options |= {"on_policy": True, "new_tokens": settings.new_tokens}
    if dtype != FLOAT32:
        options["dtype"] = dtype
    if settings.rank and with_texts:
        options["cut"] = "inputs"
    return options


def _inputs(
    adapters: Sequence[Adapter], base: BaseModel | None, texts: Mapping[str, Texts], general: Texts
) -> dict[str, str]:
    """Hashes of all that is read."""
    inputs = dict(input_hashes(adapters))
    inputs |= {f"texts:{task}": store.sha256_json(rows) for task, rows in texts.items()}
    if general:
        inputs["general"] = store.sha256_json(general)
    if base is not None and texts:
        inputs["base"] = held_fingerprint(base)
    return inputs


def _write(
    out: Path, merge: Adapter, record: AutoRecord, identity: Mapping[str, object], *, overwrite: bool, target: str
) -> AutoRecord:
    """Write a merge in a format, read it again, and return the record with the difference."""
    result = to_json(record)

    def check(written: Path) -> None:
        read = read_adapter if target == PEFT else read_lora_file
        result["verification_error"] = _difference(read(written, name="written"), merge)

    ready = merge if target == PEFT else in_format(merge, target)
    write_any(out, ready, target, identity, result, overwrite=overwrite, check=check)
    return from_json(AutoRecord, result)


def _difference(written: Adapter, meant: Adapter) -> float:
    """The largest relative difference of any module's delta, as read back."""
    worst = 0.0
    for m, f in meant.modules.items():
        g = written.modules.get(m)
        pair = None if g is None else (g.folded(), f.folded())
        if pair is None or pair[0].shape != pair[1].shape:
            raise RunError("the written adapter lacks it", where=m, hint="nothing was written; please report this")
        size = float(pair[1].A.norm() * pair[1].B.norm()) or 1.0
        off = float(
            (pair[0].B - pair[1].B).norm() * pair[1].A.norm() + (pair[0].A - pair[1].A).norm() * pair[1].B.norm()
        )
        worst = max(worst, off / size)
    if not worst < 1e-3:
        raise RunError(f"the written adapter differs from what was chosen by {worst:.2g}", hint="please report this")
    return worst
