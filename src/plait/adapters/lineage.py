"""What an adapter was trained on, as its folder records it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.adapters.config import CONFIG, read_raw_config
from plait.disk.hub import hub_facts
from plait.disk.store import MANIFEST, read_manifest


def trained_rows(folder: Path) -> Mapping[str, Any] | None:
    """Find what the record of a training says of the task's rows: its columns, template, chat; None where there is no such record.

    Of a training by `plait run` the record holds all tasks of the run by name, and which of them the adapter was trained on.
    """
    options = (read_manifest(folder) or {}).get("options", {}) if folder.is_dir() else {}
    rows = options.get("data")
    if isinstance(rows, Mapping) and "task" in options:
        rows = rows.get(options["task"])
    return rows if isinstance(rows, Mapping) else None


def base_adapter(folder: Path) -> Path | None:
    """Find the adapter, or the model an adapter was baked into, that this adapter names as its base; None if it names none.

    A path counts where it leads to such a folder from the working directory, or from beside the adapter.
    """
    if not (folder / CONFIG).is_file():
        return None
    named = read_raw_config(folder).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    places = (Path(named), folder.parent / named, folder.parent / Path(named).name)
    return next((place for place in places if _leads_elsewhere(place, folder)), None)


def _leads_elsewhere(place: Path, folder: Path) -> bool:
    """Whether there is another adapter, or a baked model; what cannot be a path, or not be looked into, is a name."""
    try:
        return place.resolve() != folder.resolve() and ((place / CONFIG).is_file() or is_baked(place))
    except (OSError, ValueError):  # too long, with NUL, half a surrogate pair; another user's
        return False


def is_one_base(one: str, other: str) -> bool:
    """Whether two names of bases are one name, or lead to one folder on this machine (`base`, `./base/`, `/models/base`)."""
    if one == other or not one or not other:
        return one == other
    places = Path(one).expanduser(), Path(other).expanduser()
    try:
        return all(place.is_dir() for place in places) and places[0].samefile(places[1])
    except OSError:
        return False


def same_name(one: str, other: str) -> bool:
    """Whether two names of a base can mean one: the last parts agree but for case and punctuation, or the folder is one.

    >>> same_name("BAAI/bge-small", "some/folder/BGE_small"), same_name("bert-base", "bert-large")
    (True, False)
    """
    a, b = Path(one).expanduser(), Path(other).expanduser()
    if a.is_dir() and b.is_dir():
        return a.resolve() == b.resolve()
    bare = [re.sub(r"[^a-z0-9]", "", n.rstrip("/").rpartition("/")[2].lower()) for n in (one, other)]
    return bare[0] == bare[1]


def of_another_base(named: str, given: Path) -> list[str]:
    """Note that the base whose weights were used is called otherwise than the one that an adapter names; a name is all that can be seen."""
    name = hub_facts(given).get("hub", str(given)).partition("@")[0]
    if not named or same_name(named, name):
        return []
    return [f"trained on {named}, as its config says, and {name} was given: right where both are the same weights"]


def is_baked(folder: Path) -> bool:
    """Whether a folder holds a model that plait baked an adapter into."""
    return (folder / MANIFEST).is_file() and (read_manifest(folder) or {}).get("stage") == "bake"
