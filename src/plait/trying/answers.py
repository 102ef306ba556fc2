"""The answers themselves: what a text model writes, or which class a classifier gives and how surely."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.border.records import nested, optional
from plait.errors import InputError, UsageError
from plait.evaluation.evaluate import Evaluator
from plait.evaluation.writing import endings, write_many
from plait.fidelity.panel import Part, parts_of, unlabelled
from plait.fidelity.texts import Texts
from plait.model.applied import applied
from plait.model.stacked import Active, stacked_factors
from plait.model.views import TaskModels
from plait.options import did_you_mean
from plait.tasks import Source, Task
from plait.trying.inputs import Missing, Trained, Trial

OnProgress = Callable[[str], None]
BASE, ALONE, MERGE = "the bare base", "its adapter", "the merge"
_OF_TYPE = {"CAUSAL_LM": "causal", "SEQ_2_SEQ_LM": "seq2seq"}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Args:
        text: What was written, the name of a class, or a number.
        probability: Of the class; None for what is written, for a number, and where nobody could be asked.
    """

    text: str
    probability: float | None = optional()


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt and its answers.

    Args:
        prompt: The text; the two of a pair on two lines.
        answers: In the order of the columns; None where nobody could be asked.
        task: Whose head answers; None where text is written.
    """

    prompt: str
    answers: tuple[Answer | None, ...] = nested(Answer)
    task: str | None = optional()


@dataclass(frozen=True, slots=True)
class Tried:
    """All answers side by side.

    Args:
        merge: What was tried.
        base: The base.
        columns: Who answers: the base, each adapter, the merge; of classifiers the base, the task's adapter, the merge.
        rows: Prompts in their order. Of classifiers, each prompt for everybody with the answers of one task after another, then the
            prompts of single tasks.
        missing: Adapters of the merge that were not found, and why.
        notes: What a reader has to know, such as whether the chat template was used.
    """

    merge: str
    base: str
    columns: tuple[str, ...]
    rows: tuple[Asked, ...] = nested(Asked)
    missing: tuple[Missing, ...] = nested(Missing, ())
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrySettings:
    """How prompts are asked.

    Args:
        tokens: New tokens at most.
        chat: Whether the tokenizer's chat template is put around each prompt; None: where an adapter was trained so.
        max_length: Tokens of a prompt that are read.
        batch_size: Texts a pass.
    """

    tokens: int = 64
    chat: bool | None = None
    max_length: int = 512
    batch_size: int = 16


def tried(
    trial: Trial,
    prompts: Texts,
    of_tasks: Mapping[str, Texts],
    settings: TrySettings,
    on_progress: OnProgress = lambda _: None,
) -> Tried:
    """Ask the base, each adapter and the merge the same.

    Args:
        trial: Who is asked.
        prompts: Texts for everybody.
        of_tasks: Task -> texts for its head alone; classifiers only.
        settings: How.
        on_progress: Called with what is being done.

    Raises:
        UsageError: No prompts, texts of a task that the merge does not have, or chat where nothing is written.
        InputError: Neither heads nor a text model; a base that does not fit.
    """
    kind = _OF_TYPE.get(trial.merge.task_type or "")
    if kind is None:
        return _classified(trial, prompts, of_tasks, settings, on_progress)
    if of_tasks:
        raise UsageError("TASK=FILE is for classifiers; a text model has no heads", hint="--prompts FILE")
    return _written(trial, kind, prompts, settings, on_progress)


# --- text -------------------------------------------------------------------------------------------------------------


def _written(trial: Trial, kind: str, prompts: Texts, settings: TrySettings, on_progress: OnProgress) -> Tried:
    members: list[tuple[str, Active]] = [(BASE, (None, 1.0)), *((a.name, (a, 1.0)) for a in trial.adapters)]
    members.append((MERGE if trial.is_merge else trial.merge.name, (trial.merge, 1.0)))
    models = TaskModels(trial.base)
    task = Task("prompts", kind, Source("none"), ("text",))
    model, tokenizer = models.of(task), models.tokenizer
    chat, notes = _chat(trial, settings, tokenizer, kind)
    ids = [_ids(tokenizer, text, chat=chat, longest=_longest(model, settings, kind)) for text in prompts]
    on_progress(
        f"{plural(len(members), 'model', 'writes', 'write')} after {plural(len(ids), 'prompt')}, up to "
        f"{plural(settings.tokens, 'token')} each"
    )
    texts = _texts(model, tokenizer, kind, ids, [active for _, active in members], settings.tokens)
    rows = tuple(Asked("\n".join(prompt), tuple(Answer(own[i]) for own in texts)) for i, prompt in enumerate(prompts))
    return Tried(trial.merge.name, trial.base.name, tuple(n for n, _ in members), rows, trial.missing, tuple(notes))


def _chat(trial: Trial, settings: TrySettings, tokenizer: Any, kind: str) -> tuple[bool, list[str]]:
    """Whether the chat template is used, and what is to be said of it and of templates in training."""
    so_trained = sorted(n for n, t in trial.trained.items() if t.chat)
    wanted = bool(so_trained) if settings.chat is None else settings.chat
    has = kind == "causal" and bool(getattr(tokenizer, "chat_template", None))
    if wanted and not has:
        if settings.chat:
            raise UsageError(
                "the base's tokenizer has no chat template", where=trial.base.name, hint="leave --chat out"
            )
        wanted = False
    notes = []
    if wanted:
        why = f": {', '.join(so_trained)} trained so" if so_trained else ""
        notes.append(f"each prompt is a user's turn in the tokenizer's chat template{why}")
    elif has and settings.chat is None:
        notes.append("prompts as they stand; --chat puts the tokenizer's chat template around them")
    for name, how in trial.trained.items():
        if isinstance(how, Trained) and how.template:
            notes.append(f"{name} was trained on prompts of the form {how.template!r}")
    return wanted, notes


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


def _ids(tokenizer: Any, text: tuple[str, ...], *, chat: bool, longest: int) -> list[int]:
    whole = "\n".join(text)
    if chat:
        turns = [{"role": "user", "content": whole}]
        found = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    else:
        found = tokenizer(whole)["input_ids"]
    ids = [int(i) for i in found]
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
            return write_many(model, tokenizer, ids, updates, len(active), tokens, ends)
    return [[_one(model, tokenizer, kind, prompt, member, tokens) for prompt in ids] for member in active]


@torch.inference_mode()
def _one(model: Any, tokenizer: Any, kind: str, ids: Sequence[int], active: Active, tokens: int) -> str:
    batch = torch.tensor([ids], dtype=torch.int64, device=next(model.parameters()).device)
    with applied(model, *active):
        found = model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=tokens, do_sample=False, num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    new = found[0, batch.shape[1] :] if kind == "causal" else found[0]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


# --- classes ----------------------------------------------------------------------------------------------------------


def _classified(
    trial: Trial, prompts: Texts, of_tasks: Mapping[str, Texts], settings: TrySettings, on_progress: OnProgress
) -> Tried:
    if settings.chat:
        raise UsageError("classifiers read no chat", hint="leave --chat out")
    parts = parts_of([trial.merge])
    names = [p.name for p in parts]
    for task in of_tasks:
        if task not in names:
            raise UsageError(f"prompts for {task!r}, and no head of that name", hint=did_you_mean(task, names))
    texts = {p.name: (*prompts, *of_tasks.get(p.name, ())) for p in parts}
    asked = [p for p in parts if texts[p.name]]
    evaluator = Evaluator(
        trial.base, {p.name: p.task for p in asked}, {p.name: unlabelled(texts[p.name]) for p in asked},
        settings.batch_size, settings.max_length,
    )  # fmt: skip
    own = {task: a for a in trial.adapters for task in a.heads}
    of_parts: list[list[Asked]] = []
    for part in asked:
        on_progress(f"{part.name}: {plural(len(texts[part.name]), 'text')}")
        of_parts.append(_of_part(evaluator, part, own.get(part.name), texts[part.name], trial))
    rows = [part[i] for i in range(len(prompts)) for part in of_parts]
    rows += [row for part in of_parts for row in part[len(prompts) :]]
    columns = (BASE, ALONE, MERGE) if trial.is_merge else (BASE, trial.merge.name)
    notes = ["the bare base answers with the task's head, which was trained on an adapter's features"]
    return Tried(trial.merge.name, trial.base.name, columns, tuple(rows), trial.missing, tuple(notes))


def _of_part(evaluator: Evaluator, part: Part, own: Adapter | None, texts: Texts, trial: Trial) -> list[Asked]:
    head_of = own.heads[part.name] if own is not None else part.head
    asked = [(None, part.head), *([(own, head_of)] if trial.is_merge else []), (trial.merge, part.head)]
    labels = trial.merge.classes_of(part.name) or (own.classes_of(part.name) if own is not None else None)
    found: list[list[Answer | None]] = []
    for place, (adapter, head) in enumerate(asked):
        if adapter is None and place:  # the task's adapter is not here
            found.append([None] * len(texts))
        else:
            logits = evaluator.predict(part.name, head, adapter)
            found.append([_answer(part.task, row, labels) for row in logits])
    answers = zip(*found, strict=True)
    return [Asked("\n".join(t), tuple(a), part.name) for t, a in zip(texts, answers, strict=True)]


def _answer(task: Task, logits: Any, labels: Sequence[str] | None) -> Answer:
    if task.kind == "regression" or len(logits) == 1:
        return Answer(f"{float(logits[0]):.3g}")
    shifted = np.exp(logits.astype(np.float64) - float(logits.max()))
    best = int(logits.argmax())
    name = labels[best] if labels and best < len(labels) else f"LABEL_{best}"
    return Answer(name, float(shifted[best] / shifted.sum()))
