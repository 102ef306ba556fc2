"""Prompts: whether each adapter answers its own, whether they go through the chat template, and how they look then."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.adapters.lineage import trained_rows
from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.disk.store import sha256_json
from plait.errors import UsageError
from plait.fidelity.record import ChatRecord
from plait.tasks.chat import checked_messages, rendered

# Columns whose cells are prompts to an assistant.
PROMPT_COLUMNS = ("prompt", "messages")


@dataclass(frozen=True, slots=True)
class Chat:
    """How prompts are asked.

    Args:
        used: Whether the chat template is put around them.
        record: The same for the record; None where texts are no prompts: then nobody answers.
        notes: What a person should know of it.
    """

    used: bool = False
    record: ChatRecord | None = None
    notes: tuple[str, ...] = ()

    @property
    def answered(self) -> bool:
        """Whether adapters are looked at in their own answers."""
        return self.record is not None


def chat_of(
    asked: bool | None, answers: bool | None, adapters: Sequence[Adapter], tokenizer: Any, new_tokens: int
) -> Chat:
    """Decide whether adapters are looked at in their own answers, and whether prompts go through the chat template.

    Args:
        asked: Whether they go through the template; None where they do if the tokenizer has one and none of the adapters says that
            it was trained without. True means answers too.
        answers: Whether texts are prompts, which the adapters answer; None where they are if the adapters are causal.
        adapters: Whose texts they are.
        tokenizer: The base's.
        new_tokens: Tokens of an adapter's own answer, for the record.

    Raises:
        UsageError: A template is asked for that is not there, or answers of adapters that do not write.
    """
    writes = all(a.task_type == "CAUSAL_LM" for a in adapters)
    template = getattr(tokenizer, "chat_template", None)
    if (asked or answers) and not writes:
        option = "--chat" if asked else "--answers"
        raise UsageError(f"{option} is for causal adapters; one of these does not write", hint="leave it out")
    if asked and not template:
        raise UsageError("the base's tokenizer has no chat template", hint="leave --chat out")
    if not asked and (answers is False or not writes):
        return Chat()
    plain = [a.name for a in adapters if _trained_plainly(a)] if template and asked is None else []
    used = bool(asked) or (asked is None and bool(template) and not plain)
    detected = answers is None and not asked
    why = " (the files hold prompts; --no-answers reads them as plain texts)" if detected else ""
    said = f"adapters are followed in their own answers, up to {plural(new_tokens, 'token')} each{why}"
    if used:
        how = "as asked for" if asked else "the tokenizer has one (--no-chat leaves it out)"
        said = f"prompts go through the tokenizer's chat template: {how}; {said}"
    elif plain:
        said = f"{', '.join(plain)} trained without the chat template: prompts stand as they are (--chat puts it around them); {said}"
    return Chat(used, ChatRecord(sha256_json(str(template)) if used else "", new_tokens, detected), (said,))


def _trained_plainly(adapter: Adapter) -> bool:
    """Whether the record of an adapter's training says that no chat template stood around its prompts."""
    rows = trained_rows(Path(str(adapter.source.get("path", ""))))
    return rows is not None and not rows.get("chat")


def conversation_of(text: tuple[str, ...]) -> list[dict[str, str]]:
    """List the turns of a prompt: those that were packed, else the text as one turn of the user.

    >>> conversation_of(("What is this?",))
    [{'role': 'user', 'content': 'What is this?'}]
    """
    whole = "\n".join(text)
    if whole.startswith("[{"):
        try:
            cell = json.loads(whole)
        except json.JSONDecodeError:
            cell = None
        if isinstance(cell, list) and all(isinstance(m, dict) and m.keys() == {"role", "content"} for m in cell):
            return checked_messages(cell, "a conversation", answered=False)
    return [{"role": "user", "content": whole}]


def prompt_ids(tokenizer: Any, text: tuple[str, ...], *, chat: bool) -> list[int]:
    """Token ids of a prompt, through the chat template or as it stands; an end token is left off: an answer follows."""
    if chat:
        return rendered(tokenizer, conversation_of(text), ask=True)
    ids: list[int] = tokenizer("\n".join(text))["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
