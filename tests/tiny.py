"""Tiny random base models of six architectures, with a word tokenizer, saved as local folders; tasks and adapters for them. No network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.model.base import BaseModel, backbone_of, load_task_model
from plait.tasks import Examples, Source, Task

ARCHITECTURES = ("bert", "roberta", "mpnet", "t5", "llama", "gpt2")
TARGETS = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "mpnet": ("attn.q", "attn.v"),
    "t5": ("q", "v"),
    "llama": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
}
WORDS = tuple(f"w{i}" for i in range(60))
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def save_tokenizer(folder: Path, architecture: str) -> int:
    """Write a tokenizer of one token a word; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate((*_SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if architecture in ("bert", "roberta", "mpnet"):
        pair = "<s> $A </s> $B:1 </s>:1" if architecture == "bert" else "<s> $A </s> $B </s>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    elif architecture == "t5":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_model(folder: Path, architecture: str, seed: int = 0, **sizes: int) -> Path:
    """Write a random model of one architecture and its tokenizer into a folder; `sizes` are a BERT's that are to be others."""
    import transformers as hf

    folder.mkdir(parents=True, exist_ok=True)
    words = save_tokenizer(folder, architecture)
    ids = {"initializer_range": 0.1, "vocab_size": words, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(seed)
    if architecture == "bert":
        model = hf.BertModel(hf.BertConfig(**ids, **{**_SIZES, **sizes}, max_position_embeddings=64))
    elif architecture == "roberta":
        model = hf.RobertaModel(hf.RobertaConfig(**ids, **_SIZES, max_position_embeddings=66))
    elif architecture == "mpnet":
        model = hf.MPNetModel(hf.MPNetConfig(**ids, **_SIZES, max_position_embeddings=66))
    elif architecture == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        del ids["initializer_range"]
        model = hf.T5ForConditionalGeneration(hf.T5Config(**ids, **sizes, decoder_start_token_id=1))
    elif architecture == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**ids, **_SIZES, num_key_value_heads=2, max_position_embeddings=64))
    else:
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**ids, **sizes))
    model.save_pretrained(folder)
    return folder


def choice_scores(model, tokenizer, task, examples, batch_size, max_length):
    """(n, answers) log-likelihood of every answer of a text task after every row's prompt."""
    from plait.evaluation.text import choices, likelihoods

    prompts, ends = choices(tokenizer, task, examples, max_length)
    return likelihoods(model, task.kind, prompts, ends, tokenizer.pad_token_id, batch_size)


def make_task(name: str = "topic", kind: str = "classification", classes: int = 2) -> Task:
    labels = tuple(f"c{i}" for i in range(classes)) if kind == "classification" else None
    metrics = {"classification": ("accuracy",), "regression": ("pearson",)}.get(kind, ("exact_match",))
    return Task(name, kind, Source("none"), ("text",), labels=labels, metrics=metrics)


def make_examples(task: Task, rows: int = 48, seed: int = 0) -> Examples:
    """Rows whose label is decided by which words occur: learnable."""
    rng = np.random.default_rng(seed)
    classes = len(task.labels) if task.labels else 2
    targets = rng.integers(0, classes, rows)
    texts = []
    for target in targets:
        words = rng.integers(10, len(WORDS), rng.integers(3, 12))
        texts.append((" ".join([WORDS[target], *(WORDS[w] for w in words), WORDS[target]]),))
    if task.kind == "classification":
        labels = targets.astype(np.int64)
    elif task.kind == "regression":
        labels = targets.astype(np.float32)
    else:
        labels = tuple(f"{WORDS[t]} {WORDS[t + 3]}" for t in targets)
    return Examples(tuple(texts), labels, np.arange(rows))


def make_adapter(base: BaseModel, task: Task, architecture: str, rank: int = 4, seed: int = 0) -> Adapter:
    """Random A, B = 0, on the architecture's usual targets."""
    backbone, prefix = backbone_of(load_task_model(base, task, seed=0))
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, module in backbone.named_modules():
        if name.endswith(TARGETS[architecture]) and hasattr(module, "weight"):
            n_out, n_in = module.weight.shape if architecture != "gpt2" else module.weight.shape[::-1]
            A = torch.randn(rank, n_in, generator=generator) / n_in**0.5
            modules[name] = LoraFactors(A, torch.zeros(n_out, rank), 2.0)
    return Adapter(
        task.name,
        base.name,
        modules,
        prefix=prefix,
        target_modules=TARGETS[architecture],
        fan_in_fan_out=architecture == "gpt2",
    )
