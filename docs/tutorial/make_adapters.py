"""Two adapters as anybody makes them, by transformers and PEFT alone."""

from pathlib import Path

import pandas
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from plait.demo.run import DATA, demo_base  # a small BERT and some rows that come with plait[demo]

BASE = Path("base")
if not BASE.exists():  # of the other tutorial
    BASE.symlink_to(demo_base())
tokenizer = AutoTokenizer.from_pretrained(BASE)
for task, classes in (("clinc", 10), ("banking", 12)):
    torch.manual_seed(0)
    rows = pandas.read_parquet(DATA / f"{task}.train.parquet").sample(frac=1, random_state=0)
    rows[["sentence"]][:20].to_csv(f"{task}.texts.csv", index=False)  # twenty inputs without labels, for later
    pandas.read_parquet(DATA / f"{task}.validation.parquet").to_csv(f"{task}.csv", index=False)
    model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=classes)
    lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for start in range(0, len(rows), 16):
        batch = rows[start : start + 16]
        inputs = tokenizer(list(batch.sentence), padding=True, return_tensors="pt")
        model(**inputs, labels=torch.tensor(batch.label.to_list())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(f"adapters/{task}")
