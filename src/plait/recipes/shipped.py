"""The recipes and studies that come with plait."""

from __future__ import annotations

from pathlib import Path

STUDIES = "studies"


def shipped_recipes(under: str = "") -> list[Path]:
    """The recipes that come with plait, by name; those of studies under `STUDIES`."""
    here = Path(__file__).parents[1]
    folder = here / "_recipes"
    return sorted((folder if folder.is_dir() else here.parents[1] / "recipes").joinpath(under).glob("*.yaml"))
