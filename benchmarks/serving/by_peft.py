"""What PEFT makes of a folder in float32, on the prompts that the servers are given."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

PROMPTS = (
    "Review: a slow start and a wonderful end.\nFeeling:",
    "Review: I left before it was over.\nFeeling:",
    "Review: not bad at all.\nFeeling:",
    "Request: is there a later train to Leeds?\nTopic:",
    "Request: my card was swallowed.\nTopic:",
    "Request: two nights in Rome, please.\nTopic:",
    "Question: 5 + 2 =\nAnswer:",
    "Question: 8 - 3 =\nAnswer:",
    "The capital of France is",
    "Once upon a time there was a",
    "def add(a, b):\n    return",
    "Water boils at",
)


def tokens(base: Path) -> list[list[int]]:
    """The prompts as the base's own tokenizer cuts them: every server is given these numbers, none its text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return [tokenizer(p)["input_ids"] for p in PROMPTS]


@torch.no_grad()
def log_probabilities(base: Path, prompts: list[list[int]], folders: list[Path]) -> dict[Path | None, Tensor]:
    """Of the token after each prompt, (prompts, vocabulary) in float64, by the base (key None) and by each folder on it."""
    import peft
    from transformers import AutoModelForCausalLM

    found: dict[Path | None, Tensor] = {}
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for folder in (None, *dict.fromkeys(folders)):
        model = whole if folder is None else peft.PeftModel.from_pretrained(whole, folder).eval()
        # A prompt at a time: no pads, nothing that a mask could get wrong.
        rows = [model(input_ids=torch.tensor([p])).logits[0, -1].double() for p in prompts]
        found[folder] = torch.log_softmax(torch.stack(rows), dim=-1)
        whole = whole if folder is None else model.unload()
    return found
