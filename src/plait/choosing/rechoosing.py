"""A merge that was chosen, with adapters added or taken out: chosen again among all that are in it then."""

from __future__ import annotations

import shlex
from pathlib import Path

from plait.adapters.arrays import FLOAT32
from plait.choosing.auto_folders import merge_auto_folders
from plait.choosing.auto_settings import AutoSettings
from plait.disk.written import Written
from plait.errors import InputError, UsageError
from plait.fidelity.record import AutoRecord
from plait.merging.changes import Change, Recorded, located, named_weights


def choose_again(recipe: Recorded, change: Change, out: Path, *, overwrite: bool = False) -> Written[AutoRecord]:
    """Choose again among the adapters of a merge that `merge auto` chose, some added, some taken out.

    Args:
        recipe: Recipe of a merge chosen from factors alone.
        change: Adapters to add and take out, and where inputs are now.
        out: Where the new merge goes.
        overwrite: Replace what stands there.

    Returns:
        What `merge_auto_folders` gives: to the bit that of choosing anew.

    Raises:
        InputError: Inputs that are gone or have changed; texts decided, and texts are not recorded (the command that
            chooses again is named).
        UsageError: Weights, a scale or statistics, which a choice makes itself; unknown names, or nothing left.
    """
    if change.weights or change.scale is not None or change.statistics:
        raise UsageError(
            "merge auto chooses weights and scale itself, and its own statistics", hint="plait merge takes them"
        )
    weights, added = named_weights(recipe, change)
    places = {**located(recipe, list(weights), change.inputs), **added}
    folders = [f"{name}={places[name]}" for name in weights]
    if any(name.startswith("texts:") for name in recipe.inputs):
        adapters = " ".join(shlex.quote(f) for f in folders)
        texts = " ".join(f"--text {name}=FILE" for name in weights)
        raise InputError(
            "was chosen by texts, which are not recorded",
            where=str(recipe.path),
            hint=f"plait merge auto BASE {adapters} {texts} --out {shlex.quote(str(out))}",
        )
    options = recipe.options
    settings = AutoSettings(
        tuple(options["methods"]), tuple(options["scales"]), options["refine"], rank=options["rank"], seed=recipe.seed
    )
    dtype = str(options.get("dtype", FLOAT32))
    return merge_auto_folders(
        folders, out, settings=settings, base_id=options.get("base"), dtype=dtype, overwrite=overwrite
    )
