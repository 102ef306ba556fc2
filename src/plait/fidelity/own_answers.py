"""What each adapter writes after its own prompts: the texts in which a merge is compared with it where prompts are all there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plait.errors import InputError
from plait.evaluation.writing import Writers, endings, write_ids
from plait.fidelity.chat import prompt_ids
from plait.fidelity.panel import Panel, Part
from plait.model.applied import applied
from plait.tasks import require_positions
from plait.tasks.task import IGNORED

Row = dict[str, Any]


def prompts_of_part(panel: Panel, part: Part) -> list[list[int]]:
    """Token ids of a part's prompts, cut from the left to the panel's length.

    Raises:
        InputError: The tokenizer makes nothing of a prompt.
    """
    prompts = [
        prompt_ids(panel.tokenizer, text, chat=panel.chat)[-panel.max_length :] for text in panel.texts[part.name]
    ]
    if empty := [i for i, ids in enumerate(prompts) if not ids]:
        raise InputError(f"the tokenizer makes nothing of text {empty[0]}", where=f"task {part.name}")
    return prompts


def cut_prompts(panel: Panel) -> dict[str, int]:
    """Count the prompts of each task that are longer than the panel's length, and so are cut from the left."""
    counts = {
        part.name: sum(
            len(prompt_ids(panel.tokenizer, text, chat=panel.chat)) > panel.max_length
            for text in panel.texts[part.name]
        )
        for part in panel.parts
    }
    return {task: n for task, n in counts.items() if n}


def answer_rows(panel: Panel, part: Part) -> list[Row]:
    """Each prompt of a part with what its adapter writes after it, greedily; `labels` are the tokens that were written.

    What was written once is kept for the whole panel, and for every panel of some of its texts.

    Raises:
        InputError: Prompt and answer have no room in the base's table of positions.

    Cost: a pass over the prompts and one step a token, once.
    """
    prompts, texts, model = prompts_of_part(panel, part), panel.texts[part.name], panel.model(part)
    require_positions(model, (len(p) + panel.new_tokens for p in prompts), f"task {part.name}")
    if missing := [i for i, text in enumerate(texts) if (part.name, text) not in panel.answers]:
        ends = endings(model, panel.tokenizer, None, panel.base.torch_device)
        with applied(model, part.adapter):
            [written] = write_ids(
                Writers(model, panel.tokenizer, ends, panel.new_tokens), [prompts[i] for i in missing]
            )
        panel.answers.update({(part.name, texts[i]): tuple(ids) for i, ids in zip(missing, written, strict=True)})
    return [row_of(prompt, panel.answers[part.name, text]) for prompt, text in zip(prompts, texts, strict=True)]


def row_of(prompt: Sequence[int], answer: Sequence[int]) -> Row:
    """A prompt and an answer as one row; only the answer is labelled."""
    ids = [*prompt, *answer]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + list(answer)}
