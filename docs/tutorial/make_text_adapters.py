"""The README's two adapters, by transformers and PEFT alone: python make_text_adapters.py BASE SST2.parquet CLINC.parquet."""

import sys

import pandas
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE, SST2, CLINC = sys.argv[1:]
TOPICS = ["car", "banking", "credit cards", "home", "food", "settings", "small talk", "travel", "utility", "work"]
ROWS, BATCH, RATE = 640, 4, 2e-3
tokenizer = AutoTokenizer.from_pretrained(BASE)


def train(name, pairs, steps):
    """Train an adapter on pairs of prompt and answer, and save it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    end = tokenizer.eos_token_id
    for step in range(steps):
        batch = [
            (tokenizer(p)["input_ids"], [*tokenizer(a)["input_ids"], end]) for p, a in pairs[step * BATCH :][:BATCH]
        ]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        rest = [width - len(prompt) - len(answer) for prompt, answer in batch]
        inputs = torch.tensor([p + a + [end] * n for (p, a), n in zip(batch, rest, strict=True)])
        mask = torch.tensor([[1] * (width - n) + [0] * n for n in rest])
        labels = torch.tensor([[-100] * len(p) + a + [-100] * n for (p, a), n in zip(batch, rest, strict=True)])
        model(input_ids=inputs, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
    model.save_pretrained(f"adapters/{name}")


reviews = pandas.read_parquet(SST2).sample(ROWS, random_state=0)
pairs = zip(reviews.sentence, reviews.label, strict=True)
train("sentiment", [(f"Review: {s.strip()}\nSentiment:", [" negative", " positive"][k]) for s, k in pairs], 40)
requests = pandas.read_parquet(CLINC).sample(ROWS, random_state=0)
pairs = zip(requests.sentence, requests.label, strict=True)
train("topics", [(f"Request: {s}\nTopic:", f" {TOPICS[k]}") for s, k in pairs], 50)
