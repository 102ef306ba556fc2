"""Chat rows: messages to token ids by the tokenizer's own template, the assistant's turns labelled and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from plait.errors import InputError
from plait.tasks.task import IGNORED

_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # how a template asks for the day
_DAY = datetime(2024, 7, 26)  # the one that Llama's template falls back to
ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, str]


def checked_messages(cell: Any, where: str, *, answered: bool = True) -> list[dict[str, str]]:
    """Check one row's conversation.

    Args:
        cell: What the row holds.
        where: The row, for the message.
        answered: Whether the last turn has to be the assistant's.

    Raises:
        InputError: Not a list of {role, content}, an unknown role, an empty turn, or the last one is not the assistant's.
    """
    if not isinstance(cell, list) or not cell or not all(isinstance(m, Mapping) for m in cell):
        raise InputError("not a list of messages with role and content", where=where)
    for i, message in enumerate(cell):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"message {i} has role {role!r}, expected one of {', '.join(ROLES)}", where=where)
        if not isinstance(content, str) or not content.strip():
            raise InputError(f"message {i} has no text", where=where)
    if answered and cell[-1]["role"] != "assistant":
        raise InputError("the last message is not the assistant's: there is nothing to learn", where=where)
    return [{"role": m["role"], "content": m["content"]} for m in cell]


def packed(messages: Sequence[Message]) -> tuple[str, str]:
    """Pack a conversation as (all turns before the last as one string, the last turn's text): a prompt and its target."""
    return json.dumps(list(messages[:-1]), ensure_ascii=False), messages[-1]["content"]


def packed_prompt(cell: Any, where: str) -> str:
    """Pack a cell of messages as one string: the turns before the assistant's last answer, which is not needed.

    Raises:
        InputError: Not a list of {role, content}, or nothing but an answer.
    """
    messages = checked_messages(cell, where, answered=False)
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return json.dumps(checked_messages(asked, where, answered=False), ensure_ascii=False)


def conversation(prompt: str, target: str, chat: str) -> list[dict[str, str]]:
    """List the messages of a prompt and its target: `chat` says whether the prompt is one user's turn, or `packed` ones."""
    before = json.loads(prompt) if chat == "messages" else [{"role": "user", "content": prompt}]
    return [*before, {"role": "assistant", "content": target}]


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> dict[str, list[int]]:
    """Token ids of a conversation; labels only where the assistant speaks, its end-of-turn token included.

    Each turn's place is found by rendering the conversation up to it, so that a template needs no marks of its own. What
    a template writes after the last end-of-turn token is left off.

    Raises:
        InputError: No chat template, one that renders a turn in another way once others follow, or an answer to nothing.
    """
    ids = rendered(tokenizer, messages, ask=False)
    labels = [IGNORED] * len(ids)
    end = tokenizer.eos_token_id
    last = len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(_agreeing(rendered(tokenizer, messages[:i], ask=True), ids))
        stop = len(_agreeing(rendered(tokenizer, messages[: i + 1], ask=False), ids))
        if end in ids[start:stop]:
            stop = stop - ids[start:stop][::-1].index(end)  # what follows the end of the turn is the template's
        labels[start:stop] = ids[start:stop]
        last = stop
    if IGNORED not in labels[:last]:
        raise InputError("nothing stands before the only answer of a conversation", where="chat")
    return {"input_ids": ids[:last], "attention_mask": [1] * last, "labels": labels[:last]}


def rendered(tokenizer: Any, messages: Sequence[Message], *, ask: bool) -> list[int]:
    """Token ids of a conversation as the tokenizer's template writes it.

    A template that writes today's date (Llama 3.2, SmolLM3) is told one day, always the same: else the same rows would be others
    tomorrow, and a training that goes on after midnight would have two kinds.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The turns; none give no tokens.
        ask: Whether the beginning of the assistant's next turn stands at the end.

    Raises:
        InputError: No chat template.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template", where="chat", hint="use a `template` instead of `chat`")
    if not messages:
        return []
    tokens = tokenizer.apply_chat_template(
        [dict(m) for m in messages],
        chat_template=_DATE.sub(lambda call: repr(_DAY.strftime(call[2])), tokenizer.get_chat_template()),
        tokenize=True,
        add_generation_prompt=ask,
        return_dict=False,
    )
    return [int(t) for t in tokens]


def _agreeing(prefix: list[int], ids: list[int]) -> list[int]:
    if prefix != ids[: len(prefix)]:
        raise InputError(
            "the chat template renders a turn in another way once others follow it: its tokens cannot be told apart",
            where="chat",
            hint="give single turns, or a template that keeps earlier turns as they were",
        )
    return prefix
