"""A panel's texts as tokens, and whether the base has positions for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plait.fidelity.panel import Panel, Part, unlabelled
from plait.tasks import encode, require_positions


def rows_of(panel: Panel, part: Part) -> list[dict[str, Any]]:
    """Encode a part's texts as tokens."""
    if part.is_text:
        from plait.fidelity.language import encoded

        return encoded(panel, part.task.kind, panel.texts[part.name])
    return panel.evaluator.encoded(part.name)


def require_room(panel: Panel) -> None:
    """Refuse texts beyond the base's table of positions: all of them are looked at, before anything long begins.

    Raises:
        InputError: Names the task, or the general texts.

    Cost: every text is tokenised once.
    """
    for part in panel.parts:
        _require(panel, rows_of(panel, part), f"task {part.name}")
    if panel.general:
        _require(panel, _general_rows(panel), "general texts")


def _general_rows(panel: Panel) -> list[dict[str, Any]]:
    first = panel.parts[0]
    if not first.is_text:
        return encode(panel.tokenizer, first.task, unlabelled(panel.general), panel.max_length)
    from plait.fidelity.language import encoded

    return encoded(panel, first.task.kind, panel.general)


def _require(panel: Panel, rows: Sequence[Mapping[str, Any]], where: str) -> None:
    read = [r[k] for r in rows for k in ("input_ids", "labels") if isinstance(r.get(k), list)]
    require_positions(panel.model(panel.parts[0]), map(len, read), where)
