"""From adapters and texts to the panel that they are asked on: what they predict, how prompts are put, whether all of it fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.errors import UsageError
from plait.fidelity.chat import Chat, chat_of
from plait.fidelity.own_answers import cut_prompts
from plait.fidelity.panel import WRITTEN, Panel, parts_of
from plait.fidelity.texts import Texts, checked
from plait.fidelity.tokens import cut_notes, require_room
from plait.model.base import BaseModel
from plait.progress import OnProgress


def ready_panel(
    base: BaseModel,
    adapters: Sequence[Adapter],
    texts: Mapping[str, Texts],
    general: Texts = (),
    *,
    chat: bool | None = None,
    answers: bool | None = False,
    on_policy: bool = False,
    new_tokens: int = 64,
    batch_size: int = 32,
    max_length: int = 128,
    known: Panel | None = None,
    on_written: Callable[[Panel], None] = lambda _: None,
    on_progress: OnProgress = lambda _: None,
) -> tuple[Panel, Chat]:
    """Make the panel that adapters are asked on.

    Args:
        base: The base model.
        adapters: Whose predictions are compared.
        texts: Adapter (or head) -> its texts.
        general: Texts of no task.
        chat: Whether prompts go through the chat template, see `plait.fidelity.chat.chat_of`.
        answers: Whether texts are prompts, which the adapters answer.
        on_policy: Whether a merge will write after the prompts: then adapters are followed in their own answers with or without a template.
        new_tokens: Tokens of an adapter's own answer, at most.
        batch_size: Texts a pass, where a model is asked alone.
        max_length: Tokens a text.
        known: Panel of the same base and adapters, asked in the same way: what was written and answered there is not computed again.
        on_written: Called with the panel after each adapter has written.
        on_progress: Called with what a person should know, and with what is being done.

    Returns:
        The panel, and how prompts are asked on it.

    Raises:
        UsageError: Texts for some adapters only, a chat template that is not there, adapters that do not write.
        InputError: Texts that are none, or that have no room in the base's table of positions.

    Cost: every text is tokenised; of prompts, the adapters' answers are written.
    """
    usable = {t: checked(x, f"texts of {t}") for t, x in texts.items()}
    parts = parts_of(adapters)
    if on_policy and any(part.task.kind != "causal" for part in parts):
        raise UsageError("on policy a merge writes, and these adapters are not causal", hint="leave --on-policy out")
    panel = Panel(base, parts, usable, general, batch_size, max_length, new_tokens=new_tokens)
    if known is not None:
        panel = replace(panel, answers=known.answers, known=known.known)
    prompting = chat_of(chat, answers, adapters, panel.tokenizer, new_tokens)
    for note in prompting.notes:
        on_progress(note)
    if prompting.record is not None:
        panel = replace(panel, chat=prompting.used)
        if cut := cut_prompts(panel):
            counts = ", ".join(f"{n} of {len(usable[t])} of {t}" for t, n in cut.items())
            note = f"prompts longer than {plural(max_length, 'token')}, cut from the left: {counts} (--max-length)"
            on_progress(note)
            prompting = replace(prompting, record=replace(prompting.record, cut=cut), notes=(*prompting.notes, note))
    elif cut_off := cut_notes(panel):
        on_progress(cut_off[0])
        prompting = replace(prompting, notes=(*prompting.notes, *cut_off))
    if prompting.answered or on_policy:
        panel = replace(panel, positions=WRITTEN)
        on_progress(f"each adapter writes after its prompts, up to {plural(new_tokens, 'token')}")
    require_room(panel, on_written)
    return panel, prompting
