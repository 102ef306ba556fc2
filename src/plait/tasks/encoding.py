"""Texts to token ids, and rows to padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.border.counts import agreed, plural
from plait.errors import InputError
from plait.tasks.chat import conversation, encode_chat
from plait.tasks.lengths import UNCUT, Cut, cut_of, whole_length
from plait.tasks.task import IGNORED, Examples, Task

Row = dict[str, Any]
_TABLES = ("position_embeddings", "wpe", "embed_positions")  # what transformers calls learnt absolute positions


def encode(tokenizer: Any, task: Task, examples: Examples, max_length: int) -> list[Row]:
    """Tokenise rows.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        task: Its kind decides: a pair of texts is encoded as a pair; causal appends the target and the end token and
            masks the prompt in `labels` (for chat, everything but the assistant's turns); seq2seq encodes the target apart.
        examples: The rows.
        max_length: Tokens a row may have; longer texts are cut (the longer of a pair first; a causal prompt from the
            left, so that the target stays).

    Returns:
        One dict per row: input_ids, attention_mask, what else the tokenizer returns, and labels.

    Raises:
        InputError: An answer of a causal task leaves no room for anything before it, or its tokenizer has no end token.
    """
    return encode_counted(tokenizer, task, examples, max_length)[0]


def encode_counted(tokenizer: Any, task: Task, examples: Examples, max_length: int) -> tuple[list[Row], Cut]:
    """Tokenise rows as `encode` does, and count those that were cut."""
    if task.kind == "causal":
        answered = task.label_column or task.chat == "messages"
        rows = _causal_rows(tokenizer, task, examples) if answered else _plain_rows(tokenizer, examples)
        if answered:
            _require_answers(task, rows, examples, max_length)
        cut = cut_of(tokenizer, _lengths(rows, "input_ids"), max_length)
        return [_end_of(r, max_length) for r in rows], cut
    if task.kind == "seq2seq":
        targets = list(map(str, examples.labels))
        whole = _seq2seq_rows(tokenizer, examples, targets, UNCUT)
        cut = cut_of(tokenizer, _lengths(whole, "input_ids"), max_length, _lengths(whole, "labels"))
        return (_seq2seq_rows(tokenizer, examples, targets, max_length) if cut.cut else whole), cut
    whole = _text_rows(tokenizer, examples, UNCUT)
    cut = cut_of(tokenizer, _lengths(whole, "input_ids"), max_length)
    return (_text_rows(tokenizer, examples, max_length) if cut.cut else whole), cut


def _lengths(rows: Sequence[Row], key: str) -> list[int]:
    return [len(r[key]) for r in rows]


def _text_rows(tokenizer: Any, examples: Examples, max_length: int) -> list[Row]:
    firsts = [t[0] for t in examples.texts]
    seconds = [t[1] for t in examples.texts] if len(examples.texts[0]) == 2 else None
    encoded = tokenizer(firsts, seconds, truncation=True, max_length=max_length)
    labels = examples.labels.tolist() if not isinstance(examples.labels, tuple) else list(examples.labels)
    return [{k: encoded[k][i] for k in encoded} | {"labels": labels[i]} for i in range(len(examples))]


def _seq2seq_rows(tokenizer: Any, examples: Examples, targets: list[str], max_length: int) -> list[Row]:
    prompts = tokenizer([t[0] for t in examples.texts], truncation=True, max_length=max_length)
    labels = tokenizer(text_target=targets, truncation=True, max_length=max_length)["input_ids"]
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": target}
        for ids, mask, target in zip(prompts["input_ids"], prompts["attention_mask"], labels, strict=True)
    ]


def _plain_rows(tokenizer: Any, examples: Examples) -> list[Row]:
    """Texts without answers as they are, whatever their length; every token but the first is foretold from those before it."""
    each = tokenizer([t[0] for t in examples.texts], truncation=True, max_length=UNCUT)["input_ids"]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED, *ids[1:]]} for ids in each]


def _causal_rows(tokenizer: Any, task: Task, examples: Examples) -> list[Row]:
    """Prompts and answers as they are, whatever their length."""
    pairs = list(zip(examples.texts, map(str, examples.labels), strict=True))
    if task.chat:
        return [encode_chat(tokenizer, conversation(t[0], target, task.chat)) for t, target in pairs]
    # a limit that no row reaches: without one transformers warns of what is cut afterwards
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer names no end token, and an answer ends with one",
            where=f"task {task.name}",
            hint="eos_token in the base's tokenizer_config.json; an encoder such as BERT is no base of causal tasks",
        )
    starts = tokenizer([t[0] for t, _ in pairs], truncation=True, max_length=UNCUT)["input_ids"]
    ends = tokenizer([f" {target}" for _, target in pairs], add_special_tokens=False)["input_ids"]
    rows = []
    for start, end in zip(starts, ends, strict=True):
        begun = start[:-1] if len(start) > 1 and start[-1] == tokenizer.eos_token_id else start
        target = [*end, tokenizer.eos_token_id]
        ids = [*begun, *target]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(begun) + target})
    return rows


def answer_length(row: Row) -> int:
    """Count the tokens of a causal row's last answer: the labelled ones at its end."""
    labels = row["labels"]
    return next((i for i, t in enumerate(reversed(labels)) if t == IGNORED), len(labels))


def _require_answers(task: Task, rows: Sequence[Row], examples: Examples, max_length: int) -> None:
    """Refuse answers that leave no room for anything before them: nothing could be learnt of how they follow."""
    lengths = [answer_length(r) for r in rows]
    long = [i for i, n in enumerate(lengths) if n >= max_length]
    if not long:
        return
    longest = max(lengths)
    row = f", row {examples.ids[long[0]]}" if len(examples.ids) == len(rows) else ""
    held = whole_length(max(len(r["input_ids"]) for r in rows))
    raise InputError(
        f"{len(long):,} of {plural(len(rows), 'answer')} {agreed(len(long), 'does', 'do')} not fit max_length {max_length}: the longest "
        f"has {plural(longest, 'token')}, its end included, and a part of the prompt has to stand before it",
        where=f"task {task.name}{row}",
        hint=f"data.max_length: {held} holds prompts and answers (--set data.max_length={held}), or leave such rows out",
    )


def _end_of(row: Row, max_length: int) -> Row:
    """The end of a causal row, where its last answer is; a first token has nothing before it to be foretold from."""
    if len(row["input_ids"]) <= max_length and row["labels"][0] == IGNORED:
        return row
    short = {k: v[-max_length:] for k, v in row.items()}
    return {**short, "labels": [IGNORED, *short["labels"][1:]]}


def require_positions(model: Any, lengths: Iterable[int], where: str) -> None:
    """Refuse rows that are longer than the model's table of positions; a model that computes them takes any length.

    Raises:
        InputError: Names the longest length and how many positions there are.
    """
    tables = (m for n, m in model.named_modules() if n.rpartition(".")[2] in _TABLES)
    room = min(
        (_positions(m) for m in tables if hasattr(m, "num_embeddings")), default=None
    )  # M2M100's grows with its texts
    longest = max(lengths, default=0)
    if room is not None and longest > room:
        raise InputError(
            f"a row of {plural(longest, 'token')}, and the base has {plural(room, 'position')}",
            where=where,
            hint=f"cut rows to that: --max-length {room}, or --set data.max_length={room}",
        )


def _positions(table: Any) -> int:
    """Rows of a table of positions that a text can use: RoBERTa's and its kin's begin after the pad's, OPT's after two."""
    before = int(getattr(table, "offset", 0)) or (0 if table.padding_idx is None else table.padding_idx + 1)
    return int(table.num_embeddings) - before


def collate(tokenizer: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Pad rows to the longest of them, on the tokenizer's padding side, into tensors."""
    width = max(len(r["input_ids"]) for r in rows)
    fills = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    batch = {k: _padded([r[k] for r in rows], width, fills[k], tokenizer.padding_side) for k in fills if k in rows[0]}
    if isinstance(rows[0].get("labels"), list):
        longest = max(len(r["labels"]) for r in rows)
        batch["labels"] = _padded([r["labels"] for r in rows], longest, IGNORED, tokenizer.padding_side)
    elif "labels" in rows[0]:
        kind = torch.float32 if isinstance(rows[0]["labels"], float) else torch.int64  # a target, or a class's number
        batch["labels"] = torch.tensor([r["labels"] for r in rows], dtype=kind)
    return batch


def _padded(lists: Sequence[Sequence[int]], width: int, fill: int, side: str) -> Tensor:
    pads = [[fill] * (width - len(x)) for x in lists]
    full = [[*p, *x] if side == "left" else [*x, *p] for x, p in zip(lists, pads, strict=True)]
    return torch.tensor(full, dtype=torch.long)


def batches(tokenizer: Any, rows: Sequence[Row], size: int, *, by_length: bool = False) -> Iterator[dict[str, Tensor]]:
    """Padded batches in order, or with `by_length` longest first (fewest pads; see `length_order`)."""
    ordered = [rows[i] for i in length_order(rows)] if by_length else rows
    for start in range(0, len(ordered), size):
        yield collate(tokenizer, ordered[start : start + size])


def length_order(rows: Sequence[Row]) -> list[int]:
    """Positions of rows from longest to shortest; ties keep their order."""
    return sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Send a batch to a device."""
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}
