"""Weights per adapter and module pattern: a file that says them, and what they are in each module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.adapters.lora import Adapter
from plait.border.checked import Record
from plait.border.counts import plural
from plait.border.multipliers import checked_multiplier
from plait.border.patterns import first_hits
from plait.disk.files import read_json, text_of
from plait.errors import InputError, UsageError
from plait.options import did_you_mean

SUFFIXES = (".yaml", ".yml", ".json")
DEFAULT = "default"
# Adapter -> pattern, or "default" -> weight.
ModuleWeights = Mapping[str, Mapping[str, float]]
_LIMIT = 8 << 20
_SUMS = {"task_arithmetic": False, "cat": False, "linear": True}  # methods of a choice -> whether they take the mean


def read_module_weights(path: Path) -> dict[str, dict[str, float]]:
    """Read ``adapter: {pattern: number, default: number}``, or ``adapter: number``, from YAML or JSON.

    A plait.json of `plait merge auto` is read too: what it learnt per adapter and module, times its scale, as weights of
    task_arithmetic.

    Raises:
        InputError: Not such a file.
        UsageError: A choice of auto whose weights are of no sum of adapters.
    """
    raw = read_json(path, limit=_LIMIT) if path.suffix == ".json" else _yaml(path)
    record = Record.of(raw, str(path), hint=_FORM)
    if {"result", "options"} <= record.values.keys():
        return _learnt(record)
    if not record.values:
        raise InputError("names no adapter", where=str(path), hint=_FORM)
    found: dict[str, dict[str, float]] = {}
    for name, value in record.values.items():
        if isinstance(value, dict):
            inside = record.record(name)
            found[name] = {key: inside.number(key) for key in inside.values}
        else:
            found[name] = {DEFAULT: record.number(name)}
    return found


_FORM = "adapter: {pattern: number, default: number}, or adapter: number"


def _yaml(path: Path) -> Any:
    from plait.border.yaml_text import load_foreign_yaml

    return load_foreign_yaml(text_of(path), str(path))


def _learnt(record: Record) -> dict[str, dict[str, float]]:
    """The weights that a merge by `plait merge auto` records."""
    result = record.record("result")
    if not result.has("chosen") or not isinstance(result.values["chosen"], dict):
        raise InputError("no choice of plait merge auto", where=record.where, hint=_FORM)
    chosen, tasks = result.record("chosen"), result.texts("tasks")
    method, scale = chosen.text("method"), chosen.number("scale")
    if method not in _SUMS or chosen.has("calibrate"):
        raise UsageError(
            f"it chose {method}{' after a calibration' if chosen.has('calibrate') else ''}, whose parts are no adapters",
            where=record.where,
            hint="weights that were learnt for a sum of adapters can be given to another merge",
        )
    share = scale / len(tasks) if _SUMS[method] else scale
    found: dict[str, dict[str, float]] = {task: {DEFAULT: share} for task in tasks}
    modules = chosen.record("weights", optional=True)
    for module, values in modules.values.items():
        if not isinstance(values, list) or len(values) != len(tasks):
            raise modules.wrong(module, values, f"a list of {plural(len(tasks), 'number')}")
        numbers = Record.of(dict(zip(tasks, values, strict=True)), record.where, inside=f"weights of {module!r}")
        for task in tasks:
            found[task][module] = share * numbers.number(task)
    return found


def weights_of_modules(
    given: ModuleWeights, adapters: Sequence[Adapter], modules: Sequence[str]
) -> tuple[tuple[float, ...], dict[str, tuple[float, ...]]]:
    r"""Each adapter's default, and module -> one weight per adapter.

    A pattern matches a module's whole name as ``(.*\.)?(PATTERN)$``, as PEFT's rank_pattern does; the first one that
    matches holds, then the adapter's default, then 1.

    Args:
        given: As `read_module_weights` gives it.
        adapters: Of the merge.
        modules: Of the merge, as it names them.

    Raises:
        UsageError: An adapter that is not in the merge, a pattern that no module of its adapter follows, or a weight out of range.
        InputError: A pattern that is no regex, or takes too long.
    """
    names = [a.name for a in adapters]
    if unknown := sorted(given.keys() - set(names)):
        raise UsageError(
            f"--weights names {unknown[0]!r}, and the adapters are {', '.join(names)}",
            hint=did_you_mean(unknown[0], names),
        )
    columns: list[dict[str, float]] = []
    for adapter in adapters:
        table = given.get(adapter.name, {})
        keys = [k for k in table if k != DEFAULT]
        called = {m: adapter.full_name(m) for m in modules if m in adapter.modules}
        hits = first_hits(keys, list(called.values()), where="--weights", what=adapter.name)
        if idle := [k for k in keys if k not in set(hits.values())]:
            raise UsageError(
                f"no module of {adapter.name!r} follows the pattern {idle[0]!r}, or an earlier pattern has them all",
                where="--weights",
                hint="plait inspect lists its modules",
            )
        default = table.get(DEFAULT, 1.0)
        columns.append({m: table[hits[called[m]]] if called.get(m) in hits else default for m in modules})
    for name, table in given.items():
        for key, value in table.items():
            checked_multiplier(value, f"the weight of {name!r}" + ("" if key == DEFAULT else f" in {key!r}"))
    defaults = tuple(given.get(name, {}).get(DEFAULT, 1.0) for name in names)
    return defaults, {m: tuple(column[m] for column in columns) for m in modules}
