"""Tiny random models of every supported architecture, in memory, and batches for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

WORDS, PAD, EOS = 90, 1, 2
_ENCODER = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
_IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 0, "initializer_range": 0.2}

# Architecture -> attention and MLP projections of one layer, and what reads one tensor there.
ATTENTION = {
    "bert": ["query", "key", "value"],
    "roberta": ["query", "key", "value"],
    "deberta": ["query_proj", "key_proj", "value_proj"],
    "mpnet": ["attn.q", "attn.k", "attn.v"],
    "t5": ["SelfAttention.q", "SelfAttention.k", "SelfAttention.v"],
    "llama": ["q_proj", "k_proj", "v_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj"],
    "qwen3": ["q_proj", "k_proj", "v_proj"],
    "mistral": ["q_proj", "k_proj", "v_proj"],
    "gemma": ["q_proj", "k_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "vit": ["q_proj", "k_proj", "v_proj"],
}


def build(architecture: str, seed: int = 0, *, layers: int = 2, **sizes: int) -> nn.Module:
    """A model with its usual head, in evaluation mode; `layers` and other sizes of decoders only."""
    import transformers as hf

    torch.manual_seed(seed)
    encoder = {**_ENCODER, "max_position_embeddings": 66, **_IDS}
    decoder = {**_DECODER, **_IDS, "num_hidden_layers": layers, **sizes}
    makers = {
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**encoder)),
        "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**encoder)),
        "deberta": lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(
                **encoder,
                relative_attention=True,
                position_biased_input=False,
                pos_att_type=["p2c", "c2p"],
                type_vocab_size=0,
            )
        ),
        "mpnet": lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**encoder)),
        "t5": lambda: hf.T5ForSequenceClassification(
            hf.T5Config(
                vocab_size=WORDS,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=PAD,
                pad_token_id=PAD,
                eos_token_id=EOS,
            )
        ),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**decoder)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**decoder)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**decoder)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**decoder)),
        "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**decoder)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64, pad_token_id=PAD
            )
        ),
        "vit": lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=16,
                patch_size=4,
            )
        ),
    }
    return makers[architecture]().eval()


def text(seed: int, examples: int = 8, length: int = 12) -> list[list[int]]:
    """Random sentences of different lengths, each ending with one end-of-text token."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(4, length, (examples,), generator=generator).tolist()
    return [[*torch.randint(3, WORDS, (n,), generator=generator).tolist(), EOS] for n in sizes]


def padded(sentences: list[list[int]], *, side: str = "right", extra: int = 0) -> dict[str, Tensor]:
    """One batch, padded to its longest sentence plus `extra`."""
    width = max(map(len, sentences)) + extra
    ids = torch.full((len(sentences), width), PAD)
    mask = torch.zeros_like(ids)
    for row, sentence in enumerate(sentences):
        place = slice(0, len(sentence)) if side == "right" else slice(width - len(sentence), width)
        ids[row, place] = torch.tensor(sentence)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def batches(architecture: str, seed: int, *, examples: int = 8, size: int = 4) -> list[dict[str, Tensor]]:
    """Batches that fit an architecture."""
    if architecture == "vit":
        generator = torch.Generator().manual_seed(seed)
        return [{"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)} for _ in range(examples // size)]
    sentences = text(seed, examples)
    return [padded(sentences[i : i + size]) for i in range(0, examples, size)]


def inputs_by_hand(
    model: nn.Module, module: nn.Module, given: list[Mapping[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """(input, output) of one module for every batch, the slow way."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _m, args, out: seen.append((args[0].detach(), out.detach())))
    with torch.no_grad():
        for batch in given:
            model(**batch)
    handle.remove()
    return seen
