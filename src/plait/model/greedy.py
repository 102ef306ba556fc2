"""Generating as scores need it: the likeliest token at every step, whatever a model's own settings for generation say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """List the tokens that end an answer: those of the model's `generation_config`, and the tokenizer's end token."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = known if isinstance(known, list) else [known]
    return sorted({int(i) for i in (*ends, tokenizer.eos_token_id) if i is not None})


@contextmanager
def greedy(model: Any, tokenizer: Any) -> Iterator[None]:
    """While open, `model.generate` takes the likeliest token at every step and ends at any of `end_tokens`.

    A `generation_config.json` may ask for beams, penalties on repetition or forbidden n-grams, and generate follows it unless each
    of them is countered by name. What is written would then depend on how it is written: alone, or beside other candidates.

    Args:
        model: A model that generates; its own settings are put back afterwards.
        tokenizer: Its tokenizer, with a pad token.
    """
    from transformers import GenerationConfig

    kept: Any = model.generation_config
    settings: Any = GenerationConfig
    model.generation_config = settings(
        do_sample=False,
        num_beams=1,
        bos_token_id=kept.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=kept.decoder_start_token_id,
        forced_bos_token_id=kept.forced_bos_token_id,  # no search, but the language that is written (mBART, NLLB)
    )
    try:
        yield
    finally:
        model.generation_config = kept
