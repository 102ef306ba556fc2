"""`merge auto`: the whole choice, from folders to a folder, with texts or from factors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from plait.adapters.arrays import FLOAT32
from plait.adapters.carried import require_exact
from plait.adapters.lora import Adapter, truncated
from plait.adapters.peft_format import read_adapter
from plait.border.records import from_json, to_json
from plait.disk import store
from plait.disk.overwriting import require_apart
from plait.disk.written import Written, reused
from plait.errors import RunError, UsageError
from plait.fidelity.candidates import METHODS, SCALES
from plait.fidelity.choose import Choice, choose
from plait.fidelity.factors_only import choose_by_factors
from plait.fidelity.given import recorded_base
from plait.fidelity.measure import Fidelity
from plait.fidelity.notes import beside, kin, kinship, other_base
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.proxy import OWN_SHARE
from plait.fidelity.record import AutoRecord, Chosen, FidelityRecord
from plait.fidelity.repair import repaired
from plait.fidelity.score import fidelities
from plait.fidelity.shift import hidden_shift
from plait.fidelity.texts import Texts, checked
from plait.formats.keys import PEFT
from plait.formats.reading import format_of
from plait.formats.single_file import read_lora_file
from plait.formats.writing import finished, in_format, write_any
from plait.merging.align import align
from plait.merging.folders import places, read_all
from plait.merging.record import input_hashes, input_of, labels_of, loss_of
from plait.merging.rounding import KEEP, dtype_for, in_dtype
from plait.model.base import BaseModel
from plait.model.identity import base_fingerprint
from plait.progress import OnProgress


@dataclass(frozen=True, slots=True)
class AutoSettings:
    """What `merge_auto` may be told.

    Args:
        methods, scales: What is tried.
        refine: Steps in which the winner's weights per adapter and module are learnt from the texts; 0 for none.
        repair: Steps in which the winner's factors are distilled on the texts, after the cut to rank; 0 for none.
        rank: Cut the result to this rank.
        max_length: Tokens a text.
        batch_size: Texts a pass, where a model is asked alone.
        seed: Seed of the order of the texts.
    """

    methods: tuple[str, ...] = METHODS
    scales: tuple[float, ...] = SCALES
    refine: int = 100
    repair: int = 0
    rank: int | None = None
    max_length: int = 128
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods or not self.scales:
            raise UsageError("nothing to try: methods and scales must not be empty")
        if any(not 0 < s < 100 for s in self.scales):
            raise UsageError(f"scales {list(self.scales)}, expected numbers above 0")
        if min(self.refine, self.repair) < 0 or (self.rank is not None and self.rank < 1):
            raise UsageError("steps must not be negative, and a rank is at least 1")


@dataclass(frozen=True, slots=True)
class AutoMerge:
    """A merge that was chosen.

    Args:
        adapter: The result.
        fidelity: Fidelity of the result on all texts, with hidden-state shifts; None without texts.
        record: What was chosen, the evidence, the inputs.
        akin: Pairs of adapters that point the same way, with the cosine.
    """

    adapter: Adapter
    fidelity: Fidelity | None
    record: AutoRecord
    akin: tuple[tuple[str, str, float], ...] = ()


def merge_auto(
    adapters: Sequence[Adapter],
    base: BaseModel | None = None,
    texts: Mapping[str, Texts] | None = None,
    *,
    general: Texts = (),
    settings: AutoSettings | None = None,
    base_id: str | None = None,
    on_progress: OnProgress = lambda _: None,
) -> AutoMerge:
    """Merge adapters by the method, weights and scale that keep most of each, chosen without labels.

    With texts, every method with and without pico at every scale is scored by fidelity (`plait.fidelity.measure`), and
    the winner's weights per adapter and module are learnt on them; without, `choose_by_factors` decides.

    Args:
        adapters: At least one; a single one comes back unchanged.
        base: Needed with texts.
        texts: Adapter (or head) -> some of the texts it was made for, unlabelled.
        general: Texts of no task in particular, for the KL to the base.
        settings: See `AutoSettings`.
        base_id: Base id of the result where the adapters name one base by different names.
        on_progress: Called with what is being done.

    Raises:
        UsageError: Texts without a base, for some adapters only, or for none of them; a repair without texts.
        InputError: Adapters of different bases; one that makes no predictions.
    """
    chosen = settings or AutoSettings()
    common = align(adapters, base_id)
    if len(adapters) > 1:
        require_exact(adapters, None, "what is chosen here")
    akin = kin(adapters)
    record = AutoRecord(
        tasks=tuple(a.name for a in adapters),
        base=common.base,
        backbone_prefix=common.backbone_prefix,
        adapters=tuple(input_of(a, 1.0) for a in adapters),
        labels=labels_of(adapters) or None,
        notes=(*kinship(akin), *beside(adapters), *(other_base(adapters, base) if texts else ())),
        chosen=Chosen("the only adapter", 1.0),
    )
    if not texts:
        if chosen.repair:
            raise UsageError("a repair distils on texts, and there are none", hint="--text TASK=FILE for every adapter")
        return replace(_without_texts(adapters, chosen, base_id, record, akin), akin=tuple(akin))
    if base is None:
        raise UsageError("texts are read by the base model, and none was given", hint="its folder or name comes first")
    panel = Panel(
        base, parts_of(adapters), {t: checked(x, f"texts of {t}") for t, x in texts.items()}, general,
        chosen.batch_size, chosen.max_length,
    )  # fmt: skip
    if len(adapters) == 1:
        return _measured(_cut(AutoMerge(adapters[0], None, record), chosen.rank), panel)
    choice = choose(
        panel, adapters, methods=chosen.methods, scales=chosen.scales, refine=chosen.refine, seed=chosen.seed,
        base=base_id, on_progress=on_progress,
    )  # fmt: skip
    record = replace(
        record,
        chosen=_chosen(choice),
        held_out=dict(choice.held_out),
        texts={t: len(x) for t, x in panel.texts.items()},
        evidence=tuple(s.evidence for s in choice.scored),
    )
    merged = _cut(AutoMerge(choice.adapter, None, record), chosen.rank)
    if chosen.repair:  # after the cut, so that it makes good what the cut loses; `advise` measures it in this order
        on_progress(f"repair, {chosen.repair} steps")
        adapter, done = repaired(panel, merged.adapter, chosen.repair, chosen.seed)
        merged = AutoMerge(adapter, None, replace(merged.record, repair=done))
    return replace(_measured(merged, panel), akin=tuple(akin))


def _without_texts(
    adapters: Sequence[Adapter],
    settings: AutoSettings,
    base_id: str | None,
    record: AutoRecord,
    akin: Sequence[tuple[str, str, float]],
) -> AutoMerge:
    if len(adapters) == 1:
        return _cut(AutoMerge(adapters[0], None, record), settings.rank)
    choice = choose_by_factors(adapters, settings.methods, settings.scales, base_id, akin)
    record = replace(record, chosen=choice.chosen, assumed={"own_share": OWN_SHARE}, evidence=choice.evidence)
    return _cut(AutoMerge(choice.adapter, None, record), settings.rank)


def _chosen(choice: Choice) -> Chosen:
    recipe = choice.recipe
    weights = {m: list(w) for m, w in choice.weights.items()}
    return Chosen(recipe.label, choice.scale, recipe.method, recipe.calibrate, recipe.moments, weights)


def _measured(merge: AutoMerge, panel: Panel) -> AutoMerge:
    """The same with its fidelity on all texts, layer by layer."""
    fidelity = fidelities(panel, [(merge.adapter, 1.0)])[0]
    parts = {p.name: p for p in panel.parts}
    tasks = [replace(t, shift=hidden_shift(panel, parts[t.task], merge.adapter)) for t in fidelity.tasks]
    whole = Fidelity(tuple(tasks), fidelity.general_kl)
    return AutoMerge(merge.adapter, whole, replace(merge.record, fidelity=FidelityRecord.of(whole)))


def _cut(merge: AutoMerge, rank: int | None) -> AutoMerge:
    if rank is None:
        modules, lost = dict(merge.adapter.modules), dict.fromkeys(merge.adapter.modules, 0.0)
    else:
        pairs = {m: truncated(f, rank) for m, f in merge.adapter.modules.items()}
        modules, lost = {m: f for m, (f, _) in pairs.items()}, {m: gone for m, (_, gone) in pairs.items()}
    record = replace(merge.record, rank=max(f.rank for f in modules.values()), loss=loss_of(modules, lost))
    return AutoMerge(replace(merge.adapter, modules=modules), merge.fidelity, record)


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
    overwrite: bool = False,
    on_progress: OnProgress = lambda _: None,
) -> Written[AutoRecord]:
    """`merge_auto` of PEFT folders into a PEFT folder whose manifest holds the evidence.

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
        on_progress: Called with what is being done.
        overwrite: Replace what stands at `out`.

    Returns:
        The record, where the result is, and whether it stood there before.
    """
    chosen = settings or AutoSettings()
    adapters = read_all(folders)
    require_apart(out, places(adapters))
    if texts and base is None and (base := recorded_base(adapters, device)) is not None:
        on_progress(f"base: {base.name}, as the adapters name it")
    options = {
        "methods": list(chosen.methods), "scales": list(chosen.scales), "refine": chosen.refine,
        "repair": chosen.repair, "rank": chosen.rank, "max_length": chosen.max_length, "base": base_id,
    }  # fmt: skip
    kind = dtype_for(dtype, adapters)
    options |= {} if kind == FLOAT32 else {"dtype": kind}
    inputs = input_hashes(adapters)
    inputs |= {f"texts:{t}": store.sha256_json(rows) for t, rows in (texts or {}).items()}
    inputs |= {"general": store.sha256_json(general)} if general else {}
    inputs |= {"base": base_fingerprint(base)} if base is not None and texts else {}
    wanted = store.identity("merge-auto", options, inputs, chosen.seed)
    if (before := finished(out, wanted, overwrite=overwrite)) is not None:
        return reused(out, before, AutoRecord)
    merge = merge_auto(
        adapters, base, texts, general=general, settings=chosen, base_id=base_id, on_progress=on_progress
    )
    merged = replace(merge.adapter, name=out.name) if len(adapters) > 1 else merge.adapter
    merged, took = in_dtype(merged, dtype, adapters)
    record = replace(merge.record, dtype=took.dtype, rounding_error=took.error) if took.rounds else merge.record
    result = to_json(record)
    target = format_of(adapters[0])

    def check(written: Path) -> None:
        read = read_adapter if target == PEFT else read_lora_file
        result["verification_error"] = _difference(read(written, name="written"), merged)

    ready = merged if target == PEFT else in_format(merged, target)
    write_any(out, ready, target, wanted, result, overwrite=overwrite, check=check)
    return Written(from_json(AutoRecord, result), str(out))


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
