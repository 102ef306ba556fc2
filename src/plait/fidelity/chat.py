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
        asked: Whether they go through the template; None where `template_used` decides. True means answers too.
        answers: Whether texts are prompts, which the adapters answer; None where they are if the adapters are causal.
        adapters: Whose texts they are.
        tokenizer: The base's.
        new_tokens: Tokens of an adapter's own answer, for the record.

    Raises:
        UsageError: A template is asked for that is not there, or answers of adapters that do not write.
    """
    writes = all(a.task_type == "CAUSAL_LM" for a in adapters)
    if (asked or answers) and not writes:
        option = "--chat" if asked else "--answers"
        raise UsageError(f"{option} is for causal adapters; one of these does not write", hint="leave it out")
    if not asked and (answers is False or not writes):
        return Chat()
    used, how = template_used(asked, adapters, tokenizer)
    detected = answers is None and not asked
    why = " (the files hold prompts; --no-answers reads them as plain texts)" if detected else ""
    said = f"{how}; adapters are followed in their own answers, up to {plural(new_tokens, 'token')} each{why}"
    template = getattr(tokenizer, "chat_template", None)
    return Chat(used, ChatRecord(sha256_json(str(template)) if used else "", new_tokens, detected), (said,))


def template_used(
    asked: bool | None, adapters: Sequence[Adapter], tokenizer: Any, before: bool | None = None
) -> tuple[bool, str]:
    """Decide whether the tokenizer's chat template is put around prompts: one rule for every command that asks causal adapters.

    What was asked for counts first, then how the merge was asked when it was chosen, then what the adapters' records of their training
    say (with the template, where they differ), then whether the tokenizer has one.

    Args:
        asked: Whether it is wanted; None where the rest decides.
        adapters: Who is asked.
        tokenizer: The base's.
        before: How a merge of these was asked when it was chosen; None where nobody knows.

    Returns:
        Whether it is used, and a sentence that says so and why.

    Raises:
        UsageError: It is asked for and not there.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    rows = {a.name: trained_rows(Path(str(a.source.get("path", "")))) for a in adapters}
    through = [name for name, r in rows.items() if r is not None and r.get("chat")]
    plain = [name for name, r in rows.items() if r is not None and not r.get("chat")]
    if asked and not has:
        raise UsageError("the base's tokenizer has no chat template", hint="leave --chat out")
    if not has:
        lacks = f"{', '.join(through)} trained with a chat template, and " if through else ""
        return False, f"prompts stand as they are: {lacks}the base's tokenizer has none"
    used = next((known for known in (asked, before) if known is not None), bool(through) or not plain)
    if asked is not None:
        why = "as asked for"
    elif before is not None:
        why = "as when the merge was chosen"
    elif through:
        why = f"{', '.join(through)} trained so" + (f", {', '.join(plain)} without it" if plain else "")
    else:
        why = f"{', '.join(plain)} trained without the chat template" if plain else "the tokenizer has one"
    other = "" if asked is not None else " (--no-chat leaves it out)" if used else " (--chat puts it around them)"
    done = "prompts go through the tokenizer's chat template" if used else "prompts stand as they are"
    return used, f"{done}: {why}{other}"


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
