"""Chat and instruct adapters: whether prompts go through the tokenizer's chat template, and how they look then."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.adapters.lora import Adapter
from plait.disk.store import read_manifest, sha256_json
from plait.errors import UsageError
from plait.fidelity.record import ChatRecord
from plait.tasks.chat import checked_messages, rendered

# Columns whose cells are prompts to an assistant.
PROMPT_COLUMNS = ("prompt", "messages")
_PROMPTS = "the files hold prompts and the tokenizer has a chat template"


@dataclass(frozen=True, slots=True)
class Chat:
    """How prompts are asked.

    Args:
        used: Whether the chat template is put around them, and adapters are looked at in their own answers.
        record: The same for the record; None where no template was thought of.
        notes: What a person should know of it.
    """

    used: bool = False
    record: ChatRecord | None = None
    notes: tuple[str, ...] = ()


def chat_of(asked: bool | None, adapters: Sequence[Adapter], tokenizer: Any, new_tokens: int) -> Chat:
    """Decide whether prompts go through the tokenizer's chat template.

    Args:
        asked: True or False; None where the texts are prompts: then they do where the tokenizer has a template, the adapters are causal,
            and none of them says that it was trained without one.
        adapters: Whose texts they are.
        tokenizer: The base's.
        new_tokens: Tokens of an adapter's own answer, for the record.

    Raises:
        UsageError: A template is asked for that is not there, or of adapters that do not write.
    """
    writes = all(a.task_type == "CAUSAL_LM" for a in adapters)
    template = getattr(tokenizer, "chat_template", None)
    if asked and not writes:
        raise UsageError("--chat is for causal adapters; one of these does not write", hint="leave it out")
    if asked and not template:
        raise UsageError("the base's tokenizer has no chat template", hint="leave --chat out")
    if asked is False or not (writes and template):
        return Chat()
    plain = [a.name for a in adapters if _trained_plainly(a)]
    if asked is None and plain:
        said = f"{', '.join(plain)} trained without the chat template: texts are read as they stand (--chat puts it around them)"
        return Chat(notes=(said,))
    why = "as asked for" if asked else f"{_PROMPTS} (--no-chat reads them as plain texts)"
    said = (
        f"prompts go through the tokenizer's chat template: {why}; adapters are followed in their own answers, up to "
        f"{new_tokens} tokens each"
    )
    return Chat(True, ChatRecord(sha256_json(str(template)), new_tokens, asked is None), (said,))


def _trained_plainly(adapter: Adapter) -> bool:
    """Whether the record of an adapter's training says that no chat template stood around its prompts."""
    path = Path(str(adapter.source.get("path", "")))
    options = (read_manifest(path) or {}).get("options", {}) if path.is_dir() else {}
    data = options.get("data")
    return isinstance(data, Mapping) and not data.get("chat")


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
