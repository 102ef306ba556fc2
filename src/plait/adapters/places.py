"""Where adapters lie, for what was named and is none itself."""

from __future__ import annotations

from pathlib import Path

CONFIG = "adapter_config.json"
# Adapters are looked for so many folders down where a folder is none itself; and so many are named.
_DEPTH, _NAMED = 3, 4


def folders_inside(folder: Path) -> list[Path]:
    """The adapter folders in a folder, those of the first levels first; itself not among them."""
    if not folder.is_dir():
        return []
    levels = ["/".join(["*"] * depth) for depth in range(1, _DEPTH + 1)]
    return [p.parent for level in levels for p in sorted(folder.glob(f"{level}/{CONFIG}"))]


def inside(folder: Path) -> str | None:
    """Adapters that lie in a folder which is none, in words."""
    found = [str(p) for p in folders_inside(folder)]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"in it lie {', '.join(found[:_NAMED])}{more}: name those" if found else None
