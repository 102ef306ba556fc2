"""What there is to choose from: merge methods, subspace methods, recipes, studies and tasks, each with one line about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from plait.border.yaml_text import load_yaml
from plait.cli.plainly import FIRST, MERGES
from plait.options import require_known
from plait.recipes.shipped import STUDIES, shipped_recipes

if TYPE_CHECKING:
    from plait.disk.method_lists import Listed


def catalogue(what: str = "") -> dict[str, list[dict[str, Any]]]:
    """The lists, or one of them.

    Args:
        what: "merges", "subspaces", "recipes", "studies", "tasks", or "" for all.
    """
    makers = {"merges": _merges, "subspaces": _subspaces, "recipes": _recipes, "studies": _studies, "tasks": _tasks}
    if what:
        require_known(what, list(makers), "list")
    return {name: make() for name, make in makers.items() if what in ("", name)}


def _methods(methods: Iterable[Listed]) -> list[dict[str, Any]]:
    rows = []
    for method in methods:
        options = {name: {"default": o.default, "allowed": o.describe()} for name, o in method.options.items()}
        rows.append({"name": method.name, "about": method.about, "paper": method.paper, "options": options})
    return rows


def _merges() -> list[dict[str, Any]]:
    from plait.fidelity.listed import forward_list
    from plait.merging.listed import merge_list

    methods = {**merge_list(), **forward_list()}
    return [
        {
            **r,
            "plainly": MERGES.get(r["name"], r["about"]),
            "needs": list(methods[r["name"]].needs),
            "first": r["name"] in FIRST,
        }
        for r in _methods(methods.values())
    ]


def _subspaces() -> list[dict[str, Any]]:
    from plait.subspaces.listed import subspace_list

    return _methods(subspace_list().values())


def _recipes() -> list[dict[str, Any]]:
    found = []
    for path in shipped_recipes():
        raw = load_yaml(path.read_text(encoding="utf-8"), str(path))
        found.append({"name": path.stem, "about": raw.get("description", "")})
    return found


def _studies() -> list[dict[str, Any]]:
    found = []
    for path in shipped_recipes(STUDIES):
        about = load_yaml(path.read_text(encoding="utf-8"), str(path)).get("description", "")
        found.append(
            {"name": f"{STUDIES}/{path.stem}", "about": " ".join(about.split()).split(". ")[0].rstrip(".") + "."}
        )
    return found


def _tasks() -> list[dict[str, Any]]:
    from plait.tasks.glue import GLUE_TASKS, glue_task

    tasks = [glue_task(name) for name in GLUE_TASKS]
    return [{"name": t.name, "about": f"GLUE, {t.kind}, {' and '.join(t.metrics)}"} for t in tasks]
