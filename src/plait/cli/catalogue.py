"""What there is to choose from: merge methods, subspace methods, recipes, studies and tasks, each with one line about it."""

from __future__ import annotations

from typing import Any

from plait.cli.plainly import FIRST, MERGES
from plait.runs.recipe_file import STUDIES, load_yaml, require_known, shipped_recipes


def catalogue(what: str = "") -> dict[str, list[dict[str, Any]]]:
    """The lists, or one of them.

    Args:
        what: "merges", "subspaces", "recipes", "studies", "tasks", or "" for all.
    """
    makers = {"merges": _merges, "subspaces": _subspaces, "recipes": _recipes, "studies": _studies, "tasks": _tasks}
    if what:
        require_known(what, list(makers), "list")
    return {name: make() for name, make in makers.items() if what in ("", name)}


def _methods(registry: Any) -> list[dict[str, Any]]:
    found = []
    for method in registry.values():
        options = {name: {"default": o.default, "allowed": o.describe()} for name, o in method.options.items()}
        first = " ".join((method.function.__doc__ or "").strip().split("\n\n")[0].split())
        found.append({"name": method.name, "about": first, "paper": method.paper, "options": options})
    return found


def _merges() -> list[dict[str, Any]]:
    from plait.fidelity.forward import METHODS
    from plait.merging import merge_methods

    known = merge_methods()
    needs: dict[str, list[str]] = {name: list(m.needs) for name, m in known.items()} | {n: ["texts"] for n in METHODS}
    rows = _methods({**known, **METHODS})
    return [
        {**r, "plainly": MERGES.get(r["name"], r["about"]), "needs": needs[r["name"]], "first": r["name"] in FIRST}
        for r in rows
    ]


def _subspaces() -> list[dict[str, Any]]:
    from plait.subspaces import subspace_methods

    return _methods(subspace_methods())


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
