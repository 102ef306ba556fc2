"""Choosing a merge from factors alone: no texts, no base, no forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from plait.adapters.lora import Adapter
from plait.choosing.candidates import Recipe, Tried, merged_by, recipes
from plait.choosing.choose import scaled
from plait.choosing.notes import kin
from plait.choosing.proxy import Terms, best_scale, mean_error, terms
from plait.errors import UsageError
from plait.fidelity.record import Chosen, Evidence, KeptOfTask
from plait.merging.registry import find_method
from plait.merging.scales import DEFAULT_METHOD, default_method, scale_by_rule
from plait.merging.spec import MergeSpec
from plait.seeds import seed_of

# Modules that stand for all where a candidate cannot be chosen: on two public adapters of 12 modules that moved errors of 0.52 to
# 0.65 by 0.024 at most, on eight random ones of 48 by 0.001.
SAMPLED = 8


@dataclass(frozen=True, slots=True)
class FactorsChoice:
    """What was chosen from factors alone.

    Args:
        adapter: The merge, scale folded in.
        chosen: Its recipe, and why.
        evidence: Everything that was tried, the least assumed error first.
    """

    adapter: Adapter
    chosen: Chosen
    evidence: tuple[Evidence, ...]


def choose_by_factors(
    adapters: Sequence[Adapter],
    methods: Sequence[str],
    scales: Sequence[float],
    base_id: str | None = None,
    akin: Sequence[tuple[str, str, float]] | None = None,
    rank: int | None = None,
) -> FactorsChoice:
    """Choose the method of the best record, at the scale of its record.

    The record is of adapters that were trained apart: the method that `plait merge` takes of them (`plait.merging.scales`), at the scale
    that was measured for it; the assumed errors of methods differ too little to tell them apart. Where two point the same way
    (`plait.merging.kinship.KIN`), or neither that method nor TSV-M is among the methods, the least error on assumed inputs decides, at the
    scale s* = sum_t c_t / sum_t q_t that brings a merge nearest to every adapter there (`plait.choosing.proxy`). On seeds on
    which nothing was chosen (docs/results/existing-fresh.md) TSV-M recovers 0.68 of eight plain adapters; s* recovered 0.60 to 0.61.

    All methods are in the evidence, with and without pico, at both scales and over the grid. Where the record decides, the others
    cannot be chosen, and `SAMPLED` modules stand for all in the evidence.

    Args:
        adapters: At least two.
        methods: Which may be taken; those that need statistics are left out.
        scales: Scales of the grid.
        base_id: Base id of the result where the adapters name one base by different names.
        akin: Pairs that point the same way (`plait.choosing.notes.kin`); None finds them.
        rank: What the merge is cut to afterwards.

    Returns:
        The merge, and why it was chosen.

    Raises:
        UsageError: None of the methods runs without statistics.
    """
    usable = [m for m in methods if not find_method(m).needs]
    if not usable:
        raise UsageError(f"{', '.join(methods)} need statistics, and there are no texts", hint="--text TASK=FILE")
    akin = kin(adapters) if akin is None else akin
    default, why = default_method(adapters, MergeSpec(rank=rank))
    first, why = (default, why) if default in usable else (DEFAULT_METHOD, "")
    ruled = scale_by_rule(first, None, (1.0,) * len(adapters))
    by_record = first in usable and not akin
    looked_at = _sampled(adapters) if by_record else list(adapters)
    modules = len({m for a in looked_at for m in a.modules})
    rows: list[Evidence] = []
    merges: dict[str, Adapter] = {}
    for recipe in recipes((), usable):
        tried = Tried(recipe, merged_by(recipe, looked_at, {}, base=base_id))
        errors = terms(tried.adapter, looked_at)
        merges |= {} if by_record else {recipe.label: tried.adapter}
        also = {ruled.value} if recipe.label == first else set()
        tried_at = sorted({*scales, round(best_scale(errors), 4), *also} - {0.0})
        rows += [_evidence(tried, s, errors, modules) for s in tried_at]
    rows.sort(key=lambda r: (r.assumed_error, r.candidate, r.scale))
    if by_record:
        best = next(r for r in rows if (r.candidate, r.scale) == (first, ruled.value))
        merge = merged_by(Recipe(first), adapters, {}, base=base_id)
        why = f"{first} by its record without data{f': it {why}' if why else ''}; {ruled.reason}"
    else:
        best = rows[0]
        merge = merges[best.candidate]
        why = "the least error on assumed inputs" + (
            f", since {akin[0][0]} and {akin[0][1]} point the same way" if akin else ""
        )
    chosen = Chosen(best.candidate, best.scale, best.method, best.calibrate, why=why)
    return FactorsChoice(scaled(merge, best.scale), chosen, tuple(rows))


def _sampled(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters in some of their modules, every kind of which is among them: drawn by their names alone."""
    names = sorted({m for a in adapters for m in a.modules}, key=lambda m: seed_of(m, "sampled"))
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(name.rpartition(".")[2], []).append(name)
    each = -(-SAMPLED // max(1, len(by_kind)))
    looked_at = {name for kind in by_kind.values() for name in kind[:each]}
    return [replace(a, modules={m: f for m, f in a.modules.items() if m in looked_at}) for a in adapters]


def _evidence(tried: Tried, scale: float, errors: Mapping[str, Terms], modules: int) -> Evidence:
    recipe = tried.recipe
    tasks = [KeptOfTask(t, x.error(scale)) for t, x in errors.items()]
    return Evidence(
        recipe.label,
        recipe.method,
        recipe.calibrate,
        scale,
        assumed_error=mean_error(errors, scale),
        modules=modules,
        tasks=tuple(sorted(tasks, key=lambda t: (-(t.assumed_error or 0.0), t.task))),
    )
