"""What a LoRA of each rank keeps of a full fine-tune: a small encoder on a classification task, trained here.

    python benchmarks/extract.py BASE ROWS --work DIR     ROWS: a folder with train.parquet and validation.parquet

Trains every weight for some steps (`--steps 60`), extracts at ranks 1 to 64, plainly and in the metric of the inputs
(statistics of `--samples` rows of the base), and scores each by its own logits: the share of the squared change kept, the
agreement of predictions with the fine-tuned model's, and the accuracy. `--json FILE` keeps the rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch

RANKS = (1, 2, 4, 8, 16, 32, 64)


def batches(rows: Any, tokenizer: Any, text: str, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Rows as tokens, with labels."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        tokens = tokenizer([r[text] for r in part], padding=True, truncation=True, max_length=64, return_tensors="pt")
        yield {**tokens, "labels": torch.tensor([r["label"] for r in part])}


def train(base: Path, rows: Any, text: str, work: Path, steps: int) -> None:
    """A full fine-tune, all weights, saved beside its tokenizer."""
    import transformers as hf

    torch.manual_seed(0)
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    model = hf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for batch in batches(rows[: 16 * steps], tokenizer, text, 16):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(work / "tuned")
    tokenizer.save_pretrained(work / "tuned")


@torch.no_grad()
def logits(model: Any, rows: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """Of all rows."""
    model.eval()
    return torch.cat([model(**b).logits for b in batches(rows, tokenizer, text, 64)])


def collected(base: Path, rows: Any, tokenizer: Any, text: str, file: Path) -> Path:
    """Statistics of the base over rows of the task."""
    import transformers as hf

    from plait.statistics import collect_statistics
    from plait.statistics.files import write_statistics

    model = hf.AutoModel.from_pretrained(base)
    given = ({k: v for k, v in b.items() if k != "labels"} for b in batches(rows, tokenizer, text, 16))
    write_statistics(file, collect_statistics(model, given, "all-linear", provenance={"task": "task"}), overwrite=True)
    return file


def row(
    rank: int, metric: bool, done: dict[str, Any], base: Path, folder: Path, tuned: torch.Tensor, rows: Any, text: str
) -> dict[str, Any]:
    """One extraction, scored."""
    import peft
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    model = hf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    found = logits(peft.PeftModel.from_pretrained(model, folder), rows, tokenizer, text)
    labels = torch.tensor([r["label"] for r in rows])
    return {
        "rank": rank,
        "metric_of_inputs": metric,
        "energy_kept": done.record.energy_kept,
        "metric_kept": done.record.metric_kept,
        "agreement": float((found.argmax(1) == tuned.argmax(1)).float().mean()),
        "logit_difference": float((found - tuned).norm() / tuned.norm()),
        "accuracy": float((found.argmax(1) == labels).float().mean()),
    }


def main() -> None:
    """Train, extract, score, print."""
    import transformers as hf

    from plait.extraction.extract import Extraction, extract

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", default="sentence")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    training, held = (parquet.read_table(given.rows / f"{s}.parquet").to_pylist() for s in ("train", "validation"))
    train(given.base, training, given.text, given.work, given.steps)
    tokenizer = hf.AutoTokenizer.from_pretrained(given.base)
    tuned = logits(
        hf.AutoModelForSequenceClassification.from_pretrained(given.work / "tuned"), held, tokenizer, given.text
    )
    labels = torch.tensor([r["label"] for r in held])
    print("fine-tuned", f"accuracy {float((tuned.argmax(1) == labels).float().mean()):.4f}")
    later = training[-given.samples :]
    file = collected(given.base, later, tokenizer, given.text, given.work / "task.stats.safetensors")
    found = []
    for rank in RANKS:
        for statistics in (None, file):
            folder = given.work / f"lora{rank}{'m' if statistics else ''}"
            ask = Extraction(given.work / "tuned", given.base, rank=rank, drop=True, statistics=statistics)
            done = extract(ask, folder, overwrite=True)
            found.append(row(rank, statistics is not None, done, given.base, folder, tuned, held, given.text))
            print(json.dumps(found[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"rows": found, "dropped": len(done.record.dropped)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
