"""Changing a merge: adapters added, taken out, weighed anew; all of it merged again, or only the difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from plait.adapters.arrays import FLOAT32
from plait.adapters.lora import Adapter, LoraFactors, concatenated, truncated
from plait.border.records import to_json
from plait.disk import store
from plait.disk.overwriting import require_apart
from plait.disk.written import Written, reused
from plait.errors import RunError, UsageError
from plait.formats.reading import format_of, read_any
from plait.formats.writing import finished, write_any
from plait.merging.align import align
from plait.merging.changes import Change, Recorded, check_statistics, located, named_weights, recorded, without_heads
from plait.merging.folders import merge_folders
from plait.merging.module_weights import DEFAULT, ModuleWeights
from plait.merging.planning import require_use
from plait.merging.record import MergeRecord, input_of, labels_of
from plait.merging.registry import Combination, find_method
from plait.merging.rescaling import scale_anew
from plait.merging.rounding import in_dtype
from plait.merging.scales import scale_by_rule

# A linear merge at full rank loses nothing when what was taken out leaves; more than this means it was not one.
_LOST = 1e-9
# A merge in 16 bits was rounded: what leaves is not quite what came, by the square of that type's step at most.
_ROUNDED = {"bfloat16": 2.0**-14, "float16": 2.0**-20}


def edit(
    path: Path, change: Change, out: Path, *, by_difference: bool = False, device: str = "cpu", overwrite: bool = False
) -> Written[MergeRecord]:
    """Merge again what a merge was made of, with adapters added, taken out or weighed anew.

    Args:
        path: A merge that plait wrote, folder or file.
        change: What is to change.
        out: Where the new merge goes.
        by_difference: Whether what changes is added and subtracted instead of merging everything: for linear methods, exact,
            and the inputs that stay need not be at hand.
        device: Where it is computed.
        overwrite: Whether what stands at `out` is replaced.

    Raises:
        InputError: No recorded recipe, or inputs that are gone or have changed (each is named).
        UsageError: Unknown names, nothing left, or a difference of a method that is no weighted sum.
    """
    recipe = recorded(path)
    require_apart(out, [path])
    if recipe.record.stack:
        raise UsageError("a stack is no merge of equals: compose it anew with --stack", where=str(path))
    if by_difference:
        return edit_by_difference(recipe, change, out, overwrite=overwrite)
    weights, added = named_weights(recipe, change)
    check_statistics(recipe, change.statistics)
    places = {**located(recipe, list(weights), change.inputs), **added}
    before = recipe.spec
    table = _changed_table(before.module_weights, weights, change)
    scale = scale_anew(recipe, change, weights)
    unweighted = table is not None or (scale is None and all(w == 1.0 for w in weights.values()))
    spec = replace(
        before,
        weights=None if unweighted else list(weights.values()),
        module_weights=table,
        scale=None if scale is None else scale.value,
        scale_reason="" if scale is None else scale.reason,
        device=device,
        disjoint=before.disjoint or not change.add,
    )
    require_use(spec, change.statistics, len(weights))
    return merge_folders(
        [f"{name}={places[name]}" for name in weights],
        out,
        spec,
        statistics=change.statistics,
        format=recipe.options.get("format"),
        dtype=str(recipe.options.get("dtype", FLOAT32)),
        overwrite=overwrite,
    )


def _changed_table(table: ModuleWeights | None, weights: Mapping[str, float], change: Change) -> ModuleWeights | None:
    """Weights by module of the adapters that are left; a new weight of an adapter takes the place of all of its own."""
    if table is None:
        return None
    kept = {n: dict(table[n]) if n in table else {DEFAULT: w} for n, w in weights.items()}
    return {**kept, **{n: {DEFAULT: float(w)} for n, w in change.weights.items()}}


def edit_by_difference(recipe: Recorded, change: Change, out: Path, *, overwrite: bool = False) -> Written[MergeRecord]:
    """Compute M' = rho M + sum_t (c'_t - rho c_t) D_t over the adapters that come, go or change weight.

    c and c' are the method's coefficients times the scale, before and after; rho is the ratio they keep for all the others (of a plain
    sum whose scale stays 1; for a mean, the weights' sums before and after). Exact to the rounding of the merged factors.

    Raises:
        UsageError: A method that is no weighted sum, or one whose result was cut: then the inputs are needed.
        InputError: An adapter that goes is not at hand.
    """
    combination = _linear(recipe)
    if change.scale is not None or change.statistics:
        raise UsageError("--by-difference takes neither --scale nor --stats", hint="leave --by-difference out")
    weights, added = named_weights(recipe, change)
    before = {a.name: float(a.weight) for a in recipe.adapters}
    old = dict(zip(before, combination(list(before.values())), strict=True))
    new = dict(zip(weights, combination(list(weights.values())), strict=True))
    changing = [n for n in before if n not in weights or n in change.weights]
    others = [n for n in before if n not in changing]
    scale = float(recipe.options.get("scale", 1.0))
    anew = scale_anew(recipe, change, weights) or scale_by_rule(
        str(recipe.options["method"]), None, list(weights.values())
    )
    ratio = next((new[n] / old[n] for n in others if old[n]), 1.0) * (anew.value / scale if scale else 1.0)
    places = {**located(recipe, changing, change.inputs), **{n: Path(p) for n, p in added.items()}}
    touched = {n: read_any(p, name=n) for n, p in places.items()}
    shares = {n: anew.value * new.get(n, 0.0) - ratio * scale * old.get(n, 0.0) for n in touched}
    merged = read_any(recipe.path, name=recipe.path.name)
    if whole := next((k for a in (merged, *touched.values()) for k in a.extras), None):
        raise UsageError(
            f"{whole!r} was trained whole, and differences are of factors", hint="leave --by-difference out"
        )
    dtype = str(recipe.options.get("dtype", FLOAT32))
    ranks = {n: (new.get(n, 0.0) != 0.0) - (old.get(n, 0.0) != 0.0) for n in touched}
    modules = _summed(merged, touched, ratio, shares, ranks, _ROUNDED.get(dtype, _LOST))
    removed_heads = [t for n, a in touched.items() if n not in weights for t in a.heads]
    heads = {**without_heads(merged, removed_heads), **{t: h for n in added for t, h in touched[n].heads.items()}}
    record = replace(_record(recipe, weights, touched, modules, merged), scale=anew.value, scale_reason=anew.reason)
    labels = labels_of([merged, *touched.values()])
    record = replace(record, labels={head: names for head, names in labels.items() if head in heads})
    facts = {t: a.facts_of(t) for a in (merged, *touched.values()) for t in a.heads if t in heads}
    adapter = replace(merged, modules=modules, heads=heads, head_facts=facts, target_modules=None)
    adapter, took = in_dtype(adapter, dtype, (), recipe.seed)
    record = took.noted(record)
    target = format_of(merged)
    inputs = {f"adapter:{n}": str(a.source["sha256"]) for n, a in touched.items()}
    inputs["merged"] = str(merged.source["sha256"])
    options = {**recipe.options, "order": list(weights), "weights": list(weights.values()), "scale": anew.value}
    wanted = store.identity("merge-difference", options, inputs, recipe.seed)
    if out.absolute() != recipe.path.absolute() and (found := finished(out, wanted, overwrite=overwrite)) is not None:
        return reused(out, found, MergeRecord)
    write_any(out, adapter, target, wanted, to_json(record), overwrite=overwrite)
    return Written(record, str(out))


def _linear(recipe: Recorded) -> Combination:
    method = find_method(str(recipe.options["method"]))
    cut = recipe.options.get("rank") is not None or recipe.record.loss.discarded_energy > 0
    if recipe.options.get("module_weights"):
        raise UsageError("its weights differ by module", where=str(recipe.path), hint="leave --by-difference out")
    if method.combination is None or cut or recipe.options.get("calibrate"):
        why = "its result was cut or calibrated" if method.combination else "it is no weighted sum of its inputs"
        raise UsageError(
            f"{method.name}: {why}, so a difference would not be that merge",
            where=str(recipe.path),
            hint="leave --by-difference out; all inputs are then needed",
        )
    return method.combination


def _summed(
    merged: Adapter,
    touched: Mapping[str, Adapter],
    ratio: float,
    shares: Mapping[str, float],
    ranks: Mapping[str, int],
    allowed: float,
) -> dict[str, LoraFactors]:
    """The sum of rho M and the shares, each module cut to the rank of those that are in it then.

    `ranks` says of each adapter whether its rank comes (1), goes (-1) or stays; `allowed` is the energy that a cut may take.
    """
    common = align([replace(merged, name="merged-so-far"), *touched.values()], merged.base, disjoint=True)
    modules: dict[str, LoraFactors] = {}
    for module in common.modules:
        parts = [(merged.modules[module], ratio)] if module in merged.modules else []
        there = {n: a.modules[module] for n, a in touched.items() if module in a.modules}
        parts += [(f, shares[n]) for n, f in there.items() if shares[n]]
        whole = concatenated([f for f, _ in parts], [w for _, w in parts])
        before = merged.modules[module].rank if module in merged.modules else 0
        rank = max(1, before + sum(ranks[n] * f.rank for n, f in there.items()))
        shorter, lost = truncated(whole, rank)
        if lost > allowed and before >= min(whole.shape) > rank:
            shorter, lost = truncated(
                whole, before
            )  # it was cut to what a matrix of its shape has, not to the sum of ranks
        if lost > allowed:
            raise RunError(
                f"taking adapters out leaves {lost:.2g} of the update beyond the rank of those that stay",
                where=module,
                hint="was the merged adapter trained or changed since?",
            )
        modules[module] = shorter
    return modules


def _record(
    recipe: Recorded,
    weights: Mapping[str, float],
    touched: Mapping[str, Adapter],
    modules: Mapping[str, LoraFactors],
    merged: Adapter,
) -> MergeRecord:
    inputs = {a.name: a for a in recipe.adapters}
    return replace(
        recipe.record,
        tasks=tuple(weights),
        weights=tuple(weights.values()),
        adapters=tuple(
            replace(inputs[n], weight=w) if n in inputs else input_of(touched[n], w) for n, w in weights.items()
        ),
        rank=max(f.rank for f in modules.values()),
        by_difference={"from": str(merged.source["sha256"]), "changed": sorted(touched)},
        verification_error=None,
    )
