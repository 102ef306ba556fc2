"""Statistics that belong together, and their sum; whether they belong to the base at hand."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from plait.errors import InputError, UsageError
from plait.model.records import other_weights, same_weights
from plait.statistics.moments import Moments, Statistics

# What must agree before two files may be added; a difference in any other key is only dropped from the record.
_MUST_AGREE = ("base", "tokenizer_sha256", "pool")


OUTPUT_GRADIENTS = "output_gradients"  # the key of a record that says how they were taken


def require_compatible(a: Statistics, b: Statistics) -> None:
    """Refuse to mix statistics of different bases, pools or modules; the message names the first difference.

    A quantised base is another set of weights on purpose: where one side is quantised, the hashes are not compared.
    Where they are, and agree, the base's name may differ: everybody keeps it in a folder of their own. Where they are of
    different kinds (a folder's and a hub commit) the names must agree.
    """
    quantised = a.provenance.get("quantisation") != b.provenance.get("quantisation")
    same = None if quantised else same_weights(a.provenance, b.provenance)
    if same is False:
        what = other_weights(_label(a) or "one", a.provenance, _label(b) or "the other", b.provenance)
        raise InputError(f"statistics differ in base: {what}", where=_label(b), hint="collect both with one base")
    for key in _MUST_AGREE:
        x, y = a.provenance.get(key), b.provenance.get(key)
        if x != y and None not in (x, y) and not (key == "base" and same):
            raise InputError(f"statistics differ in {key}: {x!r} and {y!r}", where=_label(b), hint="collect them alike")
    for what, x, y in (("module", a.modules, b.modules), ("site", a.sites, b.sites)):
        if odd := sorted(set(x) ^ set(y)):
            raise InputError(
                f"{what} {odd[0]!r} is in only one of the statistics", where=_label(b), hint="collect them alike"
            )
    for name, info in a.modules.items():
        other = b.modules[name]
        if (info.site, info.shape) != (other.site, other.shape):
            raise InputError(
                f"module {name!r} is {info.shape} at {info.site!r} and {other.shape} at {other.site!r}", where=_label(b)
            )


def merge_statistics(*statistics: Statistics) -> Statistics:
    """Add statistics of one base: batches, files, GPUs and "all the other tasks" alike.

    >>> import torch
    >>> inputs = Moments(1, torch.ones(2), torch.ones(2, 2))
    >>> mine, theirs = (Statistics({"site": inputs}, {}, {"task": task, "tokens": 1}) for task in ("mine", "theirs"))
    >>> whole = merge_statistics(mine, theirs)
    >>> whole.sites["site"].count, whole.provenance
    (2, {'tokens': 2, 'tasks': ['mine', 'theirs']})

    Returns:
        The sum. Provenance keeps what all agree on, adds samples and tokens, and lists the tasks. Output gradients are in it
        where all hold those of the same modules.

    Raises:
        InputError: None given, or they differ in base, weights, tokenizer, pool, modules or sites.
    """
    if not statistics:
        raise InputError("no statistics to merge")
    if not isinstance(statistics[0], Statistics):
        raise UsageError("takes statistics one by one", where="merge_statistics", hint="merge_statistics(*statistics)")
    first = statistics[0]
    for other in statistics[1:]:
        require_compatible(first, other)
    sites = {s: functools.reduce(Moments.merge, [x.sites[s] for x in statistics]) for s in first.sites}
    modules = {
        m: replace(info, output_energy=sum(x.modules[m].output_energy for x in statistics))
        for m, info in first.modules.items()
    }
    provenance = _merged_provenance([x.provenance for x in statistics])
    if any(set(x.output_gradients) != set(first.output_gradients) for x in statistics):
        return Statistics(sites, modules, {k: v for k, v in provenance.items() if k != OUTPUT_GRADIENTS})
    gradients = {
        m: functools.reduce(Moments.merge, [x.output_gradients[m] for x in statistics]) for m in first.output_gradients
    }
    return Statistics(sites, modules, provenance, output_gradients=gradients)


def _merged_provenance(parts: Iterable[Mapping[str, Any]]) -> Mapping[str, object]:
    parts = list(parts)
    merged: dict[str, object] = {k: v for k, v in parts[0].items() if k == "base" or all(p.get(k) == v for p in parts)}
    for key in ("samples", "tokens"):
        if all(key in p for p in parts):
            merged[key] = sum(p[key] for p in parts)
    tasks = [t for p in parts for t in p.get("tasks", [p["task"]] if p.get("task") else [])]
    distinct = list(dict.fromkeys(tasks))
    if len(distinct) > 1:
        merged["tasks"] = distinct
    return merged


def require_base(statistics: Statistics, name: str, facts: Mapping[str, Any]) -> None:
    """Refuse statistics that were collected on other weights than those of the base at hand.

    Told by hashes of one kind alone: of a local folder's files (today's or an earlier plait's), or a hub model's commit.
    A quantised base is another set of weights on purpose and is not compared.

    Args:
        statistics: Statistics whose record is asked.
        name: Name of the base at hand, for the message.
        facts: `plait.model.identity.base_facts` of it.

    Raises:
        InputError: Both are known and differ.
    """
    if statistics.provenance.get("quantisation"):
        return
    if same_weights(statistics.provenance, facts) is False:
        raise InputError(
            f"the statistics were collected on {statistics.provenance.get('base')!r}, whose files are not those of {name!r}",
            where=_label(statistics),
            hint="collect them on the base that is trained, or training.constraint=free",
        )


def _label(statistics: Statistics) -> str | None:
    task = statistics.provenance.get("task")
    return f"task {task}" if task else None
