"""What is to be done with an export: for each loader its own line, with folders that a shell takes as they are called."""

from __future__ import annotations

import shlex

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.formats.export_notes import GGUF, PEFT, VLLM, next_steps

FACTORS = {"layers.0.q_proj": LoraFactors(torch.ones(3, 6), torch.ones(4, 3), 1.0)}


def adapter(task_type: str, **heads: torch.Tensor) -> Adapter:
    return Adapter("mine", "a base", FACTORS, task_type, "", {k: {"score.weight": v} for k, v in heads.items()})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (GGUF, ["llama-server", "--model", "BASE.gguf", "--lora", "my folder"]),
        (VLLM, ["vllm", "serve", "a base", "--enable-lora", "--max-lora-rank", "3", "--lora-modules", "my folder=my folder"]),
    ],
)  # fmt: skip
def test_a_server_is_started_with_the_folder(kind, words):
    text, outputs = next_steps(adapter("CAUSAL_LM"), kind, "my folder")
    assert shlex.split(text, comments=True) == words and outputs is None


@pytest.mark.parametrize(
    ("task_type", "cls"), [("CAUSAL_LM", "AutoPeftModelForCausalLM"), ("", "AutoPeftModel"), ("ELSE", "AutoPeftModel")]
)
def test_peft_loads_it_by_the_class_of_its_task(task_type, cls):
    text, outputs = next_steps(adapter(task_type), PEFT, "it's")
    assert text == f'from peft import {cls}\n\nmodel = {cls}.from_pretrained("it\'s")\n' and outputs is None


def test_a_head_s_classes_are_given_when_it_is_loaded():
    text, outputs = next_steps(adapter("SEQ_CLS", topic=torch.ones(5, 4)), PEFT, "out")
    assert outputs == 5 and "AutoPeftModelForSequenceClassification.from_pretrained('out', **head)" in text
    assert "pipeline('text-classification', model='out', tokenizer='a base', model_kwargs=head)" in text
    assert next_steps(adapter("SEQ_CLS", topic=torch.ones(5, 4)), VLLM, "out")[1] == 5
    assert next_steps(adapter("SEQ_CLS", topic=torch.ones(5, 4)), GGUF, "out")[1] is None  # llama.cpp loads no head
