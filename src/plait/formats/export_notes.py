"""What to do next with an exported adapter: the lines that load it, as the command prints them."""

from __future__ import annotations

import shlex
from pathlib import Path

from plait.adapters.head_config import config_values, outputs_of
from plait.adapters.lora import Adapter

PEFT, VLLM, GGUF = "peft", "vllm", "gguf"
_AUTO = {
    "SEQ_CLS": ("AutoPeftModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoPeftModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoPeftModelForQuestionAnswering", "question-answering"),
    "CAUSAL_LM": ("AutoPeftModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoPeftModelForSeq2SeqLM", "text2text-generation"),
}
_PLAIN = """\
from peft import {cls}

model = {cls}.from_pretrained({folder!r})
"""
_WITH_HEAD = """\
from peft import {cls}
from transformers import pipeline

# PEFT's config names no classes: they are given when the adapter is loaded.
head = {values}
model = {cls}.from_pretrained({folder!r}, **head)
# or at once, with transformers 5.18 or newer: older ones load the folder with a random head and say nothing
classify = pipeline({task!r}, model={folder!r}, tokenizer={base!r}, model_kwargs=head)
"""
_VLLM = "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={folder}\n"
_GGUF = "llama-server --model BASE.gguf --lora {folder}  # the base by llama.cpp's convert_hf_to_gguf.py\n"


def next_steps(adapter: Adapter, kind: str, out: Path | str) -> tuple[str, int | None]:
    """Give the lines that load an export, and how many outputs its head has; None without a head.

    Args:
        adapter: As it is written, its one head included.
        kind: The loader.
        out: Where it goes.

    Raises:
        InputError: A head whose number of outputs cannot be told.
    """
    head = next(iter(adapter.heads), None) if kind != GGUF else None
    base = adapter.base or "BASE"
    outputs = outputs_of(adapter, head, str(out)) if head else None
    if kind == GGUF:
        return _GGUF.format(folder=shlex.quote(str(out))), None
    if kind == VLLM:
        quoted = (shlex.quote(t) for t in (base, Path(out).name, str(out)))  # the base's name is the adapter's own word
        text = _VLLM.format(**dict(zip(("base", "name", "folder"), quoted, strict=True)), rank=adapter.rank)
        return text, outputs
    cls, task = _AUTO.get(adapter.task_type or "", ("AutoPeftModel", ""))
    if head is None or outputs is None:
        return _PLAIN.format(cls=cls, folder=str(out)), None
    values = config_values(adapter.facts_of(head), outputs)
    if adapter.task_type != "SEQ_CLS":
        del values["problem_type"]
    shown = "{\n" + "".join(f"    {k!r}: {v!r},\n" for k, v in values.items()) + "}"
    text = _WITH_HEAD.format(cls=cls, task=task, values=shown, folder=str(out), base=base)
    return text, outputs
