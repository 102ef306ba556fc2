"""A panel's texts as tokens, and whether the base has positions for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plait.border.counts import plural
from plait.fidelity.own_answers import answer_rows
from plait.fidelity.panel import WRITTEN, Panel, Part, unlabelled
from plait.fidelity.texts import Texts
from plait.tasks import encode, require_positions
from plait.tasks.lengths import UNCUT, Cut, cut_of, whole_length

# Tokens of decoder input taken from the text itself, where a text has no second part to be written.
MAX_DECODED_TOKENS = 32


def rows_of(panel: Panel, part: Part) -> list[dict[str, Any]]:
    """Encode a part's texts as tokens; of prompts, with what the part's adapter writes after them."""
    if not part.is_text:
        return panel.evaluator.encoded(part.name)
    if panel.positions == WRITTEN and part.task.kind == "causal":
        return answer_rows(panel, part)
    return encoded(panel, part.task.kind, panel.texts[part.name])


def encoded(panel: Panel, kind: str, texts: Texts) -> list[dict[str, Any]]:
    """Rows of token ids: a causal model's text whole; for seq2seq the first part, and `labels` of what is written.

    What a sequence-to-sequence model writes is the second part of a pair; of a single text it is given its own beginning.
    """
    tokenizer, length = panel.tokenizer, panel.max_length
    rows = []
    for text in texts:
        if kind == "causal":
            ids = tokenizer("\n".join(text), truncation=True, max_length=length)["input_ids"]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
        else:
            source = tokenizer(text[0], truncation=True, max_length=length)
            target = tokenizer(
                text_target=text[-1], truncation=True, max_length=length if len(text) > 1 else MAX_DECODED_TOKENS
            )
            rows.append({k: source[k] for k in ("input_ids", "attention_mask")} | {"labels": target["input_ids"]})
    return rows


def cut_notes(panel: Panel) -> list[str]:
    """Say how many texts are longer than the panel's length, and so are read up to there; [] where none is.

    Cost: every text is tokenised.
    """
    cuts = {f"of {part.name}": _cut(panel, part.task.kind, panel.texts[part.name]) for part in panel.parts}
    if panel.general:
        cuts["general ones"] = _cut(panel, panel.parts[0].task.kind, panel.general)
    return cut_said(cuts, panel.max_length)


def cut_said(cuts: Mapping[str, Cut], limit: int) -> list[str]:
    """Say in a line what a length takes from texts; [] where it takes nothing.

    Args:
        cuts: Whose texts, such as "of sst2" -> what is cut of them.
        limit: Tokens of a text that are read.
    """
    cuts = {name: cut for name, cut in cuts.items() if cut.cut}
    if not cuts:
        return []
    counts = ", ".join(f"{cut.cut} of {cut.rows} {name}" for name, cut in cuts.items())
    longest = max(cut.longest for cut in cuts.values())
    held, room = whole_length(longest), next(iter(cuts.values())).room
    cure = f"--max-length {held} would hold all"
    if room is not None and held > room:
        cure = f"the longest has {longest}, and the base reads {room}"
    return [f"texts longer than {plural(limit, 'token')} are read up to there: {counts} ({cure})"]


def _cut(panel: Panel, kind: str, texts: Texts) -> Cut:
    """What the panel's length takes from some texts."""
    given: dict[str, Any] = {"truncation": True, "max_length": UNCUT}
    targets: list[str] = []
    if kind == "causal":
        read = panel.tokenizer(["\n".join(text) for text in texts], **given)
    elif kind == "seq2seq":
        read = panel.tokenizer([text[0] for text in texts], **given)
        targets = [text[1] for text in texts if len(text) > 1]  # of a single text a beginning is meant
    else:
        read = panel.tokenizer([t[0] for t in texts], [t[1] for t in texts] if len(texts[0]) > 1 else None, **given)
    answers = [len(ids) for ids in panel.tokenizer(text_target=targets, **given)["input_ids"]] if targets else []
    return cut_of(panel.tokenizer, [len(ids) for ids in read["input_ids"]], panel.max_length, answers)


def require_room(panel: Panel, on_written: Callable[[Panel], None] = lambda _: None) -> None:
    """Refuse texts beyond the base's table of positions: all of them are looked at, before anything long begins.

    Args:
        panel: Base, adapters and texts.
        on_written: Called with the panel after each part where prompts are answered.

    Raises:
        InputError: Names the task, or the general texts.

    Cost: every text is tokenised once; of prompts, the adapters' answers are written.
    """
    if panel.general:
        _require(panel, _general_rows(panel), "general texts")
    for part in panel.parts:
        written = len(panel.answers)
        _require(panel, rows_of(panel, part), f"task {part.name}")
        if len(panel.answers) > written:
            on_written(panel)


def _general_rows(panel: Panel) -> list[dict[str, Any]]:
    first = panel.parts[0]
    if not first.is_text:
        return encode(panel.tokenizer, first.task, unlabelled(panel.general), panel.max_length)
    return encoded(panel, first.task.kind, panel.general)


def _require(panel: Panel, rows: Sequence[Mapping[str, Any]], where: str) -> None:
    read = [r[k] for r in rows for k in ("input_ids", "labels") if isinstance(r.get(k), list)]
    require_positions(panel.model(panel.parts[0]), map(len, read), where)
