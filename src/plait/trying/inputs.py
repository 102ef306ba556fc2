"""What is tried: a merge, the adapters that it was made of where they still are, and the base they all need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.adapters.beside import no_matrix
from plait.adapters.lineage import trained_rows
from plait.adapters.lora import Adapter
from plait.adapters.naming import split_name
from plait.adapters.peft_format import read_adapter
from plait.border.checked import shown
from plait.border.records import from_json
from plait.disk.hub import adapter_place, cached_folder, split_revision
from plait.disk.manifest import MANIFEST, read_manifest
from plait.errors import InputError, PlaitError, UsageError
from plait.formats.reading import read_any
from plait.merging.changes import whereabouts
from plait.merging.record import MergedInput
from plait.model.base import BaseModel

_AGAIN = "--adapter NAME=PATH says where it is"


@dataclass(frozen=True, slots=True)
class Missing:
    """An adapter that went into the merge and is not tried: its name and why."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Trial:
    """What is to be tried.

    Args:
        merge: The merge; a single adapter is tried alone.
        adapters: Those that went into it and were found, in the order of its record.
        missing: Those that were not.
        base: The base.
        templates: Name of an adapter -> what was put around its texts in training, as far as its record tells.
        is_merge: Whether it is a merge at all.
        through_chat: Whether prompts went through the chat template when the merge was chosen by what it answers; None where it was not.
    """

    merge: Adapter
    adapters: tuple[Adapter, ...]
    missing: tuple[Missing, ...]
    base: BaseModel
    templates: Mapping[str, str]
    is_merge: bool
    through_chat: bool | None = None

    @property
    def asked(self) -> tuple[Adapter, ...]:
        """The adapters whose training says how prompts looked: those of the merge, or the one that is tried alone."""
        return self.adapters if self.is_merge else (self.merge,)


def trial_of(place: str, base: str | None, named: Sequence[str], device: str = "auto") -> Trial:
    """Find everything that is tried beside a merge.

    Args:
        place: The merge, or a single adapter: a folder, or its name on the hub.
        base: The base; None for the one that the merge names, where it is on this machine.
        named: ``NAME=PATH`` of adapters that are no longer where the record says, or are to stand beside a merge without one.
        device: Where the base runs.

    Raises:
        InputError: No such folder, no base of that name, or a merge that predicts nothing.
        UsageError: A name that the merge does not have.
    """
    folder = adapter_place(place)
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise InputError(
            "a whole model, not an adapter", where=place, hint="try the merge's adapter folder, before it is baked"
        )
    merge = read_adapter(folder)
    _require_whole_update(merge)
    record = read_manifest(folder) or {}
    result: Mapping[str, Any] = record.get("result", {})
    inputs = tuple(from_json(MergedInput, a, str(folder)) for a in _listed(result, "adapters", folder))
    tasks = [a.name for a in inputs] or list(map(str, _listed(result, "tasks", folder)))
    given = _given(named, tasks, place)
    found, missing = _found(inputs, given, tasks, folder)
    known = {a.name: _template(a) for a in (*found, *(() if tasks else (merge,)))}
    templates = {name: template for name, template in known.items() if template}
    chat = result.get("chat")
    through_chat = bool(chat.get("template")) if isinstance(chat, Mapping) else None
    base_model = _base(merge, base, device)
    return Trial(merge, tuple(found), tuple(missing), base_model, templates, bool(tasks), through_chat)


def _listed(result: Mapping[str, Any], key: str, folder: Path) -> list[Any]:
    value = result.get(key) or []
    if not isinstance(value, list):
        raise InputError(f"result.{key} is {shown(value)}, expected a list", where=str(folder / MANIFEST))
    return value


def _given(named: Sequence[str], tasks: Sequence[str], place: str) -> dict[str, str]:
    given = {}
    for text in named:
        name, path = split_name(text)
        name = name or read_any(path).name
        if tasks and name not in tasks:
            raise UsageError(f"no adapter {name!r} in this merge", where=place, hint=f"it has {', '.join(tasks)}")
        given[name] = path
    return given


def _found(
    inputs: Sequence[MergedInput], given: Mapping[str, str], tasks: Sequence[str], folder: Path
) -> tuple[list[Adapter], list[Missing]]:
    """Read the adapters that are where they are looked for; what is not there, or cannot be tried, is told by name."""
    known = {a.name: a for a in inputs}
    found, missing = [], []
    for name in tasks or given:
        try:
            adapter = _adapter(name, known.get(name), given.get(name), folder)
            _require_whole_update(adapter)
            found.append(adapter)
        except PlaitError as e:
            missing.append(Missing(name, f"{e.what} ({_AGAIN})" if name not in given else e.what))
    return found, missing


def _adapter(name: str, recorded: MergedInput | None, given: str | None, folder: Path) -> Adapter:
    if given is not None:
        adapter = read_any(adapter_place(given), name=name)
        if recorded is not None and adapter.source.get("sha256") != recorded.sha256:
            raise InputError(f"({given}) is not what was merged under this name")
        return adapter
    if recorded is None:
        raise InputError("the merge's record does not say where it is")
    place, why = whereabouts(recorded, folder)
    if place is None:
        raise InputError(why)
    return read_any(place, name=name)


def _require_whole_update(adapter: Adapter) -> None:
    if adapter.extras:
        hint = None if no_matrix(adapter.extras) else "plait convert --base DIR --rank R makes it low rank"
        raise InputError(
            f"it also trained {next(iter(adapter.extras))} whole, which is not tried here",
            where=adapter.name,
            hint=hint,
        )


def _template(adapter: Adapter) -> str | None:
    """What the record of a training says was put around its texts."""
    template = (trained_rows(Path(str(adapter.source.get("path", "")))) or {}).get("template")
    return template if isinstance(template, str) else None


def _base(merge: Adapter, asked: str | None, device: str) -> BaseModel:
    """The base that was asked for; else the recorded one, where it lies here: nothing is downloaded on a record's word."""
    if asked is not None:
        name, revision = (asked, None) if Path(asked).expanduser().is_dir() else split_revision(asked)
        return BaseModel(str(Path(name).expanduser()) if name.startswith("~") else name, revision, "float32", device)
    if (folder := Path(merge.base).expanduser()) and (folder / "config.json").is_file():
        return BaseModel(str(folder), None, "float32", device)
    if merge.base and cached_folder(merge.base, merge.revision) is not None:
        return BaseModel(merge.base, merge.revision, "float32", device)
    raise InputError(
        f"its base {merge.base!r} is neither a folder here nor in the hub's cache",
        where=merge.name,
        hint="--base FOLDER or NAME",
    )
