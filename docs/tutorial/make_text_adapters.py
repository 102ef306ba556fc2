"""The README's two adapters, by transformers and PEFT alone, and the files it names: python make_text_adapters.py BASE.

Writes adapters/, reviews.csv, requests.csv and prompts.csv where it is called; minutes on a CPU. BASE is a folder of
SmolLM2-135M-Instruct. The README shows the answers of a copy out of a 4-bit file: the original may word some otherwise.
"""

import sys
from pathlib import Path

import pandas
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from plait.demo.run import DATA  # rows that come with plait

TOPICS = ["car", "banking", "credit cards", "home", "food", "settings", "small talk", "travel", "utility", "work"]
BATCH, RATE = 4, 2e-3


def train(base, name, rows, steps):
    """Train an adapter on rows of prompt and answer, and save it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    end = tokenizer.eos_token_id
    pairs = [(tokenizer(p)["input_ids"], [*tokenizer(f" {a}")["input_ids"], end]) for p, a in rows]
    for step in range(steps):
        batch = [pairs[i % len(pairs)] for i in range(step * BATCH, (step + 1) * BATCH)]
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


def write_rows():
    """Write rows with their prompts; the reviews are made up for this, the requests from CLINC150."""
    reviews = pandas.read_csv(Path(__file__).parent / "made_up_reviews.csv")
    reviews["prompt"] = "Review: " + reviews.review + "\nSentiment:"
    reviews.to_csv("reviews.csv", index=False)
    requests = pandas.read_parquet(DATA / "clinc.train.parquet").sample(200, random_state=0)
    requests = pandas.DataFrame({"request": requests.sentence, "topic": [TOPICS[k] for k in requests.label]})
    requests["prompt"] = "Request: " + requests.request + "\nTopic:"
    requests.to_csv("requests.csv", index=False)
    asked = ["Review: it never gets off the ground\nSentiment:", "Request: book me a flight to rome\nTopic:"]
    pandas.DataFrame({"prompt": asked}).to_csv("prompts.csv", index=False)


if __name__ == "__main__":
    write_rows()
    for name, file, answer, steps in (
        ("sentiment", "reviews.csv", "sentiment", 60),
        ("topics", "requests.csv", "topic", 50),
    ):
        train(sys.argv[1], name, pandas.read_csv(file)[["prompt", answer]].itertuples(index=False), steps)
