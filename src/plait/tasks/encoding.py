"""Texts to token ids, and rows to padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.errors import InputError
from plait.tasks.chat import conversation, encode_chat
from plait.tasks.task import IGNORED, TEXT_KINDS, Examples, Task

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
    """
    if task.chat:
        pairs = zip(examples.texts, examples.labels, strict=True)
        return [encode_chat(tokenizer, conversation(t[0], str(y), task.chat), max_length) for t, y in pairs]
    if task.kind in TEXT_KINDS:
        maker = _causal if task.kind == "causal" else _seq2seq
        return [
            maker(tokenizer, t[0], str(target), max_length)
            for t, target in zip(examples.texts, examples.labels, strict=True)
        ]
    firsts = [t[0] for t in examples.texts]
    seconds = [t[1] for t in examples.texts] if len(examples.texts[0]) == 2 else None
    encoded = tokenizer(firsts, seconds, truncation=True, max_length=max_length)
    labels = examples.labels.tolist() if not isinstance(examples.labels, tuple) else list(examples.labels)
    return [{k: encoded[k][i] for k in encoded} | {"labels": labels[i]} for i in range(len(examples))]


def _causal(tokenizer: Any, prompt: str, target: str, max_length: int) -> Row:
    start = tokenizer(prompt, add_special_tokens=True)["input_ids"]
    if start and start[-1] == tokenizer.eos_token_id and len(start) > 1:
        start = start[:-1]
    end = tokenizer(" " + target, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    if len(end) >= max_length:
        raise InputError(f"a target of {len(end)} tokens does not fit max_length {max_length}", where=target[:40])
    start = start[-(max_length - len(end)) :]
    ids = start + end
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(start) + end}


def _seq2seq(tokenizer: Any, prompt: str, target: str, max_length: int) -> Row:
    encoded = tokenizer(prompt, truncation=True, max_length=max_length)
    labels = tokenizer(text_target=target, truncation=True, max_length=max_length)["input_ids"]
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}


def require_positions(model: Any, lengths: Iterable[int], where: str) -> None:
    """Refuse rows that are longer than the model's table of positions; a model that computes them takes any length.

    Raises:
        InputError: Names the longest length and how many positions there are.
    """
    room = min((_positions(m) for n, m in model.named_modules() if n.rpartition(".")[2] in _TABLES), default=None)
    longest = max(lengths, default=0)
    if room is not None and longest > room:
        raise InputError(
            f"a row of {longest} tokens, and the base has {room} positions",
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
