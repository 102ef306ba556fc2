"""What a text model and its adapters write after prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.errors import InputError, UsageError
from plait.evaluation.writing import Writers, endings, write_many
from plait.fidelity.chat import prompt_ids, template_used
from plait.fidelity.texts import Texts
from plait.model.applied import applied
from plait.model.greedy import greedy
from plait.model.stacked import Active, stacked_factors
from plait.model.views import TaskModels
from plait.tasks import Source, Task
from plait.trying.inputs import Trial
from plait.trying.records import BASE, MERGE, Answer, Asked, OnProgress, Prompts, Tried, TrySettings

_OF_TYPE = {"CAUSAL_LM": "causal", "SEQ_2_SEQ_LM": "seq2seq"}


def kind_of(adapter: Adapter) -> str | None:
    """Say what an adapter of a text model is, "causal" or "seq2seq"; None for others."""
    return _OF_TYPE.get(adapter.task_type or "")


def written(
    trial: Trial, kind: str, prompts: Prompts, settings: TrySettings, on_progress: OnProgress = lambda _: None
) -> Tried:
    """Have everybody write after the prompts for all, and after those of a task the base, its adapter and the merge.

    Args:
        trial: Who is asked.
        kind: From `kind_of`.
        prompts: What they are asked.
        settings: How.
        on_progress: Called with what is being done.

    Raises:
        UsageError: A chat template that is not there, or no room for an answer.
        InputError: A prompt that is too long, or nothing.
    """
    last: tuple[str, Active] = (MERGE if trial.is_merge else trial.merge.name, (trial.merge, 1.0))
    everybody: list[tuple[str, Active]] = [(BASE, (None, 1.0)), *((a.name, (a, 1.0)) for a in trial.adapters), last]
    models = TaskModels(trial.base)
    model, tokenizer = models.of(Task("prompts", kind, Source("none"), ("text",))), models.tokenizer
    chat, notes = _chat(trial, settings, tokenizer, kind)
    longest = _longest(model, settings, kind)
    asked: list[tuple[str | None, list[tuple[str, Active]], Texts]] = (
        [(None, everybody, prompts.for_all)] if prompts.for_all else []
    )
    asked += [
        (task, [m for m in everybody if m[0] in (BASE, task, last[0])], texts)
        for task, texts in prompts.of_tasks.items()
    ]
    ready = [
        (task, members, texts, [_ids(tokenizer, text, kind, chat=chat, longest=longest) for text in texts])
        for task, members, texts in asked
    ]
    rows: list[Asked] = []
    for task, members, texts, ids in ready:
        on_progress(
            f"{plural(len(members), 'model', 'writes', 'write')} after {plural(len(ids), 'prompt')}"
            f"{f' of {task}' if task else ''}, up to {plural(settings.tokens, 'token')} each"
        )
        answers = _texts(model, tokenizer, kind, ids, [active for _, active in members], settings.tokens)
        names = tuple(name for name, _ in members) if task else None
        rows += [
            Asked("\n".join(text), tuple(Answer(own[i]) for own in answers), task, names)
            for i, text in enumerate(texts)
        ]
    columns = tuple(name for name, _ in everybody)
    return Tried(trial.merge.name, trial.base.name, columns, tuple(rows), trial.missing, (*notes, *prompts.notes))


def _chat(trial: Trial, settings: TrySettings, tokenizer: Any, kind: str) -> tuple[bool, list[str]]:
    """Whether the chat template is used, and what is to be said of it and of templates in training."""
    told = [f"{name} was trained on prompts of the form {how!r}" for name, how in trial.templates.items()]
    if kind == "causal":
        used, said = template_used(settings.chat, trial.asked, tokenizer, trial.through_chat)
        return used, [said, *told]
    if settings.chat:
        raise UsageError("encoder-decoders read no chat", where=trial.base.name, hint="leave --chat out")
    return False, told


def _longest(model: Any, settings: TrySettings, kind: str) -> int:
    """Tokens of a prompt that leave room for the answer."""
    room = getattr(model.config, "max_position_embeddings", None)
    if kind != "causal" or not isinstance(room, int) or room <= 0:
        return settings.max_length
    if room <= settings.tokens:
        raise UsageError(
            f"{plural(settings.tokens, 'new token', 'leaves', 'leave')} no room in a context of {room}",
            hint="a smaller --tokens",
        )
    return min(settings.max_length, room - settings.tokens)


def _ids(tokenizer: Any, text: tuple[str, ...], kind: str, *, chat: bool, longest: int) -> list[int]:
    whole = "\n".join(text)
    causal = kind == "causal"
    ids = prompt_ids(tokenizer, text, chat=chat) if causal else [int(i) for i in tokenizer(whole)["input_ids"]]
    if not ids:
        raise InputError("the tokenizer makes nothing of it", where=f"prompt {whole!r:.60}")
    if len(ids) > longest:
        raise InputError(
            f"{plural(len(ids), 'token')}, at most {longest} fit",
            where=f"prompt {whole!r:.60}",
            hint="--max-length, --tokens",
        )
    return ids


def _texts(
    model: Any, tokenizer: Any, kind: str, ids: Sequence[Sequence[int]], active: Sequence[Active], tokens: int
) -> list[list[str]]:
    """What each writes, greedily: all at once on a causal model whose updates stack, else one after another."""
    if kind == "causal":
        try:
            updates = stacked_factors(model, active)
        except UsageError:  # fused experts, embeddings, convolutions
            pass
        else:
            ends = endings(model, tokenizer, None, next(model.parameters()).device)
            return write_many(Writers(model, tokenizer, ends, tokens, updates, len(active)), ids)
    return [[_one(model, tokenizer, kind, prompt, member, tokens) for prompt in ids] for member in active]


@torch.inference_mode()
def _one(model: Any, tokenizer: Any, kind: str, ids: Sequence[int], active: Active, tokens: int) -> str:
    batch = torch.tensor([ids], dtype=torch.int64, device=next(model.parameters()).device)
    with applied(model, *active), greedy(model, tokenizer):
        found = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=tokens)
    new = found[0, batch.shape[1] :] if kind == "causal" else found[0]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()
