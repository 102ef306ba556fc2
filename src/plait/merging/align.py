"""Whether adapters can be merged at all: one base, equal shapes, compatible tasks; and what each lacks."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plait.adapters.arrays import equal
from plait.adapters.carried import Carried, carried
from plait.adapters.config import CLASSIFICATION_TYPES, MERGED_TYPE
from plait.adapters.experts import same_experts
from plait.adapters.heads import HeadFacts
from plait.adapters.lineage import base_adapter, is_one_base
from plait.adapters.lora import EXPERT, Adapter, LoraFactors
from plait.adapters.naming import distinct_names
from plait.errors import InputError, UsageError
from plait.merging.record import labels_of
from plait.merging.shared import require_shared
from plait.model.records import same_weights

if TYPE_CHECKING:
    from torch import Tensor

_ONE_EXPERT = re.compile(r"\.experts\.\d+\.\w+$")


@dataclass(frozen=True, slots=True)
class Alignment:
    """What adapters have in common.

    Args:
        base: Base id of the result.
        modules: Module -> (shape, kind), sorted by name.
        missing: Task -> modules it does not adapt (its delta there is zero); tasks that lack none are left out.
        task_type, prefix, backbone_prefix: Of the result; and what the inputs' prefix was.
        carried: Tensors that are no LoRA factors, passed through.
        disjoint: Whether adapters without a module in common were meant as they are.
    """

    base: str
    modules: dict[str, tuple[tuple[int, int], str]]
    missing: dict[str, list[str]]
    task_type: str | None
    prefix: str
    backbone_prefix: str
    carried: Carried
    disjoint: bool = False


def align(adapters: Sequence[Adapter], base: str | None = None, *, disjoint: bool = False) -> Alignment:
    """Check adapters against each other.

    Args:
        adapters: At least one, names distinct.
        base: Takes the place of the bases the adapters name, where their names differ and the weights do not.
        disjoint: Adapters that have no module in common, or names that look like two for one module, are meant as they are.

    Raises:
        UsageError: No adapters, or two of one name.
        InputError: Different bases, shapes or kinds of model; both adapters are named.
    """
    if not adapters:
        raise UsageError("nothing to merge", hint="give at least one adapter folder")
    distinct_names([a.name for a in adapters], "adapter")
    for adapter in adapters:
        _require_finite(adapter)
    _check_formats(adapters)
    base_of_all = _base(adapters) if base is None else base  # before shapes and task types, which follow from it
    modules = _modules(adapters)
    if not modules:
        raise InputError("none of the adapters adapts a module", where=", ".join(a.name for a in adapters))
    absent = {a.name: [m for m in modules if m not in a.modules] for a in adapters}
    if base is None:
        _require_one_model(adapters)
    task_type, prefix = _task_type(adapters)
    if not disjoint and (base is None or any(a.base for a in adapters)):
        require_shared(adapters)
    _check_heads(adapters)
    prefixes = sorted({a.prefix or str(a.source.get("backbone_prefix", "")) for a in adapters} - {""})
    return Alignment(
        base=base_of_all,
        modules=modules,
        missing={name: names for name, names in absent.items() if names},
        task_type=task_type,
        prefix=prefix,
        backbone_prefix=prefixes[0] if prefixes else "",
        carried=carried(adapters),
        disjoint=disjoint,
    )


def _require_finite(adapter: Adapter) -> None:
    """NaN in, NaN out: refused here. An adapter read from a folder was checked when it was read."""
    if "sha256" in adapter.source:
        return
    from plait.adapters.tensors import all_finite

    for module, f in adapter.modules.items():
        if not all_finite(f.A) or not all_finite(f.B) or not math.isfinite(f.scaling):
            raise InputError(f"module {module!r} holds NaN or infinity", where=adapter.name)


def _check_formats(adapters: Sequence[Adapter]) -> None:
    """Formats name one module differently, so that adapters of two formats would be merged side by side."""
    first = adapters[0]
    for other in adapters[1:]:
        a, b = (x.source.get("format", "peft") for x in (first, other))
        if a != b:
            raise InputError(
                f"{first.name!r} is a {a} adapter and {other.name!r} a {b} one",
                where=other.name,
                hint=_way_to_one_format({str(a): first, str(b): other}),
            )


def _way_to_one_format(pair: Mapping[str, Adapter]) -> str:
    if not {a.task_type for a in pair.values()} <= {None, MERGED_TYPE}:
        return "one adapts a language model, the other an image model"
    if pair.keys() == {"kohya", "original"}:
        place = shlex.quote(str(pair["original"].source.get("path", "FILE")))
        return f"plait convert {place} --to kohya --out FILE changes its names only"
    return "plait convert brings one to the other's format, where it knows the model's names"


def _require_one_model(adapters: Sequence[Adapter]) -> None:
    """PEFT folders that name no base and share no module are the parts of a pipeline rather than adapters of one model."""
    first, *others = adapters
    for other in others:
        unnamed = not any(a.base or "format" in a.source for a in (first, other))
        if unnamed and not first.modules.keys() & other.modules.keys():
            raise InputError(
                f"{first.name!r} and {other.name!r} have no module in common, and neither names its base",
                where=other.name,
                hint="if they adapt one model, say which with --base",
            )


def _base(adapters: Sequence[Adapter]) -> str:
    """The base all name. LoRA files seldom name one: there an unknown base goes with any (shapes are checked)."""
    known = [a for a in adapters if a.base or "format" not in a.source]
    first, *others = known or adapters
    for other in others:
        if not is_one_base(first.base, other.base) or revision_of(other) != revision_of(first):
            raise InputError(
                f"{first.name!r} was trained on {_named(first)} and {other.name!r} on {_named(other)}",
                where=other.name,
                hint="one lies on the other: plait merge --stack composes them"
                if any(base_adapter(Path(str(a.source.get("path", "")))) for a in (first, other))
                else "adapters of different bases cannot be merged; if both names mean the same weights, say which with --base",
            )
        if same_weights(first.source, other.source) is False:
            raise InputError(f"the base weights of {first.name!r} and {other.name!r} differ", where=other.name)
    return first.base


def revision_of(adapter: Adapter) -> str:
    """The revision of an adapter's base; a hub's main branch is what none named means."""
    return adapter.revision or "main"


def _named(adapter: Adapter) -> str:
    if not adapter.base:
        return "a base that it does not name"
    return repr(adapter.base) + (f" at revision {adapter.revision!r}" if adapter.revision else "")


def _modules(adapters: Sequence[Adapter]) -> dict[str, tuple[tuple[int, int], str]]:
    found: dict[str, tuple[tuple[int, int], str]] = {}
    owner: dict[str, str] = {}
    for adapter in adapters:
        for module, factors in adapter.modules.items():
            known = found.setdefault(module, (factors.shape, factors.kind))
            if known != (factors.shape, factors.kind):
                raise InputError(
                    f"module {module!r} is {_shown(known)} in {owner[module]!r} and "
                    f"{_shown((factors.shape, factors.kind))} in {adapter.name!r}",
                    where=adapter.name,
                    hint="not adapters of the same base model",
                )
            owner.setdefault(module, adapter.name)
    _check_experts(adapters)
    return {m: found[m] for m in sorted(found)}


def _check_experts(adapters: Sequence[Adapter]) -> None:
    """Fused weights must have the same experts everywhere; and experts trained one by one bear other names than fused ones."""
    first = adapters[0]
    for other in adapters[1:]:
        if differing := same_experts(first.modules, other.modules):
            raise InputError(
                f"{differing} in {first.name!r} and {other.name!r}",
                where=other.name,
                hint="not adapters of the same base model",
            )
    fused = next((a for a in adapters for f in a.modules.values() if f.kind == EXPERT), None)
    single = next((a for a in adapters for m in a.modules if _ONE_EXPERT.search(m)), None)
    if fused and single:
        raise InputError(
            f"{single.name!r} adapts experts one by one, as older transformers have them, and {fused.name!r} fused",
            where=single.name,
            hint="of Mixtral, Qwen3-MoE and their kin PEFT with transformers 5 loads it fused: PeftModel.from_pretrained(base, DIR)"
            ".save_pretrained(NEW); of others, such as Qwen2-MoE, it drops the experts in silence",
        )


def _shown(module: tuple[tuple[int, int], str]) -> str:
    (out, width), kind = module
    return f"{kind} ({out}, {width})"


def _task_type(adapters: Sequence[Adapter]) -> tuple[str | None, str]:
    """A task model's type is kept where all agree and no head distinguishes them; classifiers become their backbone.

    The backbone keeps the name it has in its classifier, of the first input that knows one: adapters of a bare backbone do
    not. Where classifiers name it differently, each head remembers its own (`HeadFacts.prefix`).
    """
    types = {a.task_type for a in adapters}
    if types <= {*CLASSIFICATION_TYPES, MERGED_TYPE, None} and types & CLASSIFICATION_TYPES:
        return MERGED_TYPE, next((a.prefix for a in adapters if a.prefix), "")
    if len(types) > 1 and types != {None, *types}:
        raise InputError(
            f"task types {', '.join(sorted(map(str, types)))} are models of different shapes",
            where=", ".join(f"{a.name} (of {a.base})" if a.base else a.name for a in adapters),
            hint="those of one type merge: a classifier and a text model of one base stay two adapters",
        )
    prefix = next((a.prefix for a in adapters if a.prefix), "")
    return next((a.task_type for a in adapters if a.task_type), None), prefix


def _check_heads(adapters: Sequence[Adapter]) -> None:
    """Two inputs may bring a head for one task (merges of merges) only where it is the same head."""
    seen: dict[str, Adapter] = {}
    for adapter in adapters:
        for task, head in adapter.heads.items():
            other = seen.setdefault(task, adapter).heads[task]
            if head.keys() != other.keys() or any(not equal(head[k], other[k]) for k in head):
                raise InputError(
                    f"{seen[task].name!r} and {adapter.name!r} bring different heads for task {task!r}",
                    where=adapter.name,
                    hint="heads are not merged; give one task another name",
                )


def head_facts_of(adapters: Sequence[Adapter]) -> dict[str, HeadFacts]:
    """Collect what is known of every head that the inputs bring."""
    return {head: adapter.facts_of(head) for adapter in adapters for head in adapter.heads}


def assembled(name: str, common: Alignment, adapters: Sequence[Adapter], modules: dict[str, LoraFactors]) -> Adapter:
    """Put the adapter around merged modules: every input's heads, the union of targets."""
    heads: dict[str, dict[str, Tensor]] = {}
    for adapter in adapters:
        heads |= {task: dict(head) for task, head in adapter.heads.items()}
    facts = {
        k: a.source[k] for a in adapters for k in ("base_sha256", "base_weights_sha256", "format") if k in a.source
    }
    labels = labels_of(adapters)
    layouts = {k: v for a in reversed(adapters) for k, v in a.source.get("layouts", {}).items()}
    return Adapter(
        name=name,
        base=common.base,
        modules=modules,
        task_type=common.task_type,
        prefix=common.prefix,
        heads=heads,
        extras=common.carried.whole,
        modules_to_save=common.carried.saved,
        copies=common.carried.copies,
        revision=next((a.revision for a in adapters if a.revision), None),
        target_modules=_targets(adapters),
        target_parameters=tuple(sorted({t for a in adapters for t in a.target_parameters})),
        fan_in_fan_out=any(a.fan_in_fan_out for a in adapters),
        source={
            "backbone_prefix": common.backbone_prefix,
            "merged_from": [a.name for a in adapters],
            "layouts": layouts,
            **facts,
            **({"labels": labels} if labels else {}),
        },
        head_facts=head_facts_of(adapters),
    )


def _targets(adapters: Sequence[Adapter]) -> tuple[str, ...] | str | None:
    """The union of the inputs' target lists, or None where one of them is a pattern or was narrowed to some layers."""
    found: list[str] = []
    for adapter in adapters:
        if not isinstance(adapter.target_modules, tuple):
            return adapter.target_modules if len({a.target_modules for a in adapters}) == 1 else None
        found += [t for t in adapter.target_modules if t not in found]
    return tuple(sorted(found))
