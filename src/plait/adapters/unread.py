"""Factors that count here and that PEFT passes over, because the adapter's own config leaves their modules out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plait.adapters.lora import Adapter
from plait.loading.targeted import untargeted_notes


def unread_lines(adapters: Sequence[Adapter]) -> list[str]:
    """Name the adapters of which PEFT would load less than is read here, a line each; of PEFT folders alone."""
    return [
        line
        for a in adapters
        if a.source.get("format", "peft") == "peft" and isinstance(place := a.source.get("path"), str)
        for line in untargeted_notes(a.name, Path(place), map(a.full_name, a.modules))
    ]
