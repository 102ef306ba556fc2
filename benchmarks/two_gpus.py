"""Checks training on two GPUs: one adapter alone, by DDP, and with the base split over both (FSDP2), must be the same.

    python benchmarks/two_gpus.py [--size small|billion|tiny] [--device cuda|cpu] --out FILE.json

A Llama with random weights (small: 0.2 billion weights, billion: 1.0) and a task of random words; float32; 20 steps. Prints
one JSON object: the largest relative difference of a delta and of the head to the run alone, seconds, and the peak memory of
each process. Exits 1 where a difference is over the tolerance. On the CPU the two processes talk by gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter
from plait.disk.store import identity
from plait.model.base import BaseModel, backbone_of, load_task_model
from plait.tasks import Examples, Source, Task
from plait.training import TrainingSettings, train_adapter

SIZES = {"small": (1024, 16, 16, 2816), "billion": (2048, 20, 16, 5632), "tiny": (64, 2, 4, 128)}
TOLERANCE = 1e-3
WORDS = [f"w{i}" for i in range(2000)]
TASK = Task("topic", "classification", Source("none"), ("text",), labels=("a", "b"))
SETTINGS = TrainingSettings(steps=20, lr=1e-3, batch_size=16, max_length=64, accumulation=2, checkpoint_every=10)


def save_base(folder: Path, size: str) -> None:
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    width, layers, heads, inner = SIZES[size]
    config = hf.LlamaConfig(
        vocab_size=len(words), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, pad_token_id=1, bos_token_id=0, eos_token_id=2, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(folder)


def examples(rows: int = 256) -> Examples:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, rows)
    texts = [(" ".join([WORDS[t], *(WORDS[w] for w in rng.integers(10, 2000, rng.integers(10, 50)))]),) for t in labels]
    return Examples(tuple(texts), labels.astype(np.int64), np.arange(rows))


def start(base: BaseModel) -> Adapter:
    backbone, prefix = backbone_of(load_task_model(replace(base, device="cpu"), TASK, seed=0))
    g, modules = torch.Generator().manual_seed(0), {}
    for name, module in backbone.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            n_out, n_in = module.weight.shape
            rows = torch.linalg.qr(torch.randn(n_in, 8, generator=g))[0].T.contiguous()
            modules[name] = LoraFactors(rows, torch.zeros(n_out, 8), 2.0)
    return Adapter(TASK.name, base.name, modules, prefix=prefix, target_modules=("q_proj", "v_proj"))


def work(folder: Path, device: str, mode: str) -> None:
    """Train once; run alone or by torchrun."""
    import warnings

    warnings.simplefilter("ignore")
    base, rank = BaseModel(str(folder / "base"), device=device), os.environ.get("RANK", "0")
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = time.perf_counter()
    train_adapter(
        start(base), TASK, examples(), base, replace(SETTINGS, shard_base=mode == "split"),
        seed=0, out=folder / mode, identity=identity("train", {"mode": mode}, seed=0),
    )  # fmt: skip
    found = {"seconds": time.perf_counter() - before}
    if on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    (folder / f"{mode}-{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def largest_difference(a: Adapter, b: Adapter) -> float:
    pairs = [(f.delta(), b.modules[n].delta()) for n, f in a.modules.items()]
    pairs += [(t, b.heads[TASK.name][n]) for n, t in a.heads[TASK.name].items()]
    return max(float((x - y).norm() / y.norm().clamp(min=1e-12)) for x, y in pairs if float(y.norm()) > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(Path(options.work), options.device, options.mode)
        return 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_base(folder / "base", options.size)
        same = [str(Path(__file__)), "--device", options.device, "--work", place, "--mode"]
        two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        subprocess.run([sys.executable, *same, "alone"], check=True)
        for mode in ("ddp", "split"):  # processes of their own, so that peaks are theirs
            subprocess.run([sys.executable, *two, *same, mode], check=True)
        alone = read_adapter(folder / "alone", name=TASK.name)
        found: dict[str, object] = {"size": options.size, "device": options.device, "torch": torch.__version__}
        for mode, ranks in (("alone", 1), ("ddp", 2), ("split", 2)):
            runs = [json.loads((folder / f"{mode}-{r}.json").read_text()) for r in range(ranks)]
            found[mode] = {"processes": runs}
            if mode != "alone":
                found[mode]["difference"] = largest_difference(read_adapter(folder / mode, name=TASK.name), alone)
    if options.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name(0)
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(found[m]["difference"] > TOLERANCE for m in ("ddp", "split")))


if __name__ == "__main__":
    sys.exit(main())
