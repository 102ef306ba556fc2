"""Whether adapters of one base mean the same modules: names that differ by a wrapper, and adapters that share no module."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from plait.adapters.config import MERGED_TYPE
from plait.adapters.lora import Adapter
from plait.border.module_names import named_by
from plait.errors import InputError
from plait.model.stored_names import by_core

_PEFT = "peft"


def require_shared(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that would be merged side by side where one on the other is meant.

    Different targets are legal: what an adapter does not adapt is zero. But where two adapters share nothing at all, or call
    one module by two names, the sum of both is seldom what they are, and no loader would say so.

    Raises:
        InputError: Two names for one module, or adapters that fall into groups without a module in common; with the way out.
    """
    for one, other in combinations(adapters, 2):
        _refuse_two_names(one, other)
    first, *rest = _groups(adapters)
    for group in rest:
        if not _other_component(first, group):
            one, other = first[0], group[0]
            raise InputError(
                f"{one.name!r} and {other.name!r} have no module in common ({_first(one)} in one, {_first(other)} in the other)",
                where=other.name,
                hint="of one base, one run and one version of transformers, which renames layers, they would; if it is meant, "
                "plait merge --disjoint puts them side by side",
            )


def with_one_root(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Name modules within the backbone, as classifiers have them, in adapters that name no classification task as well.

    Trained on the same classifier's class, or on a masked language model, their names begin with the backbone's too
    ("bert.encoder..."), and only a classifier's config says that this is the backbone.
    """
    prefixes = {a.prefix for a in adapters if a.prefix}
    if len(prefixes) != 1:
        return list(adapters)
    return [_inside(a, next(iter(prefixes))) for a in adapters]


def _inside(adapter: Adapter, prefix: str) -> Adapter:
    start = f"{prefix}."
    if (
        adapter.prefix
        or adapter.task_type not in (None, MERGED_TYPE)
        or not all(m.startswith(start) for m in adapter.modules)
    ):
        return adapter
    return replace(
        adapter,
        prefix=prefix,
        modules={m.removeprefix(start): f for m, f in adapter.modules.items()},
        target_parameters=tuple(t.removeprefix(start) for t in adapter.target_parameters),
    )


def _first(adapter: Adapter) -> str:
    return adapter.full_name(next(iter(adapter.modules), ""))


def _refuse_two_names(one: Adapter, other: Adapter) -> None:
    """Names that are equal without wrappers, or, where nothing is shared, names of which one ends in the other."""
    mine = {one.full_name(m): m for m in one.modules if m not in other.modules}
    theirs = {other.full_name(m): m for m in other.modules if m not in one.modules}
    by_mine, by_theirs = by_core(mine), by_core(theirs)
    pair = next(
        (
            (a, b)
            for core, a in by_mine.items()
            if (b := by_theirs.get(core)) and a != b and one.modules[mine[a]].shape == other.modules[theirs[b]].shape
        ),
        None,
    )
    if pair is None and not one.modules.keys() & other.modules.keys():
        pair = _different_roots(mine, theirs)
    if pair is None:
        return
    old, new = _prefixes(*pair)
    place, renaming = (shlex.quote(t) for t in (str(one.source.get("path", one.name)), f"{old}={new}"))
    raise InputError(
        f"{one.name!r} calls a module {pair[0]!r} that {other.name!r} seems to call {pair[1]!r}: their module names start at "
        "different roots",
        where=other.name,
        hint=f"plait convert {place} --rename {renaming} --out DIR names it as the other does; "
        "if they are two modules, --disjoint",
    )


def _different_roots(mine: Mapping[str, str], theirs: Mapping[str, str]) -> tuple[str, str] | None:
    a, b = next(iter(mine), ""), next(iter(theirs), "")
    found = next(((m, b) for m in mine if named_by(m, b)), None)
    return found or next(((a, m) for m in theirs if named_by(m, a)), None)


def _prefixes(a: str, b: str) -> tuple[str, str]:
    """What two names begin with before the words they end in together."""
    one, other = a.split("."), b.split(".")
    while one and other and one[-1] == other[-1]:
        one.pop()
        other.pop()
    return ".".join(one), ".".join(other)


def _groups(adapters: Sequence[Adapter]) -> list[list[Adapter]]:
    """Adapters that share modules, directly or through others, together; in their order."""
    groups: list[tuple[set[str], list[Adapter]]] = []
    for adapter in adapters:
        names = {*adapter.modules}
        joined = [g for g in groups if g[0] & names]
        groups = [g for g in groups if not g[0] & names]
        members = [a for _, group in joined for a in group] + [adapter]
        groups.append((names.union(*(g[0] for g in joined)), members))
    return [members for _, members in groups]


def _other_component(one: Sequence[Adapter], other: Sequence[Adapter]) -> bool:
    """Whether they adapt different parts of a pipeline: a LoRA file's names say which."""
    return not _components(one) & _components(other)


def _components(adapters: Sequence[Adapter]) -> set[str]:
    found: set[str] = set()
    for adapter in adapters:
        kind = adapter.source.get("format", _PEFT)
        for module in adapter.modules:
            dotted = module.partition(".")[0]
            found.add(_PEFT if kind == _PEFT else dotted if "." in module else "_".join(module.split("_")[:2]))
    return found
