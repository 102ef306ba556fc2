r"""A fleet of adapters on a base of Llama-3-8B's geometry: seconds a step and peak memory.

    python benchmarks/training_8b.py --study recipes/studies/text-qwen15.yaml --set data.root=TASKS --tokenizer DIR \
        --work DIR --out FILE.json

The base has random weights in bfloat16 (speed does not depend on them) and the vocabulary of the tokenizer; it is written into --work and
read from there like any other. Adapters are of rank 16, plain, each on its own task of the study, batches of 16 rows of at most
--length tokens. `q+v` and `all-linear` are fleets of their own; a step's seconds are of all adapters together, after the first five.
`--width 0.03 --layers 2 --device cpu` is a minute on a CPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from plait.adapters.lora import Adapter, LoraFactors
from plait.disk.store import identity, versions
from plait.model.base import backbone_of
from plait.recipes.recipe_file import read_recipe
from plait.runs.session import Session
from plait.training import Member, TrainingSettings, fleet_run, train_fleet

TARGETS = {
    "q+v": ("q_proj", "v_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def config_of(vocabulary: int, layers: int, width: float) -> LlamaConfig:
    """The geometry of Llama-3-8B, narrower by a factor to try things out."""
    heads = max(2, round(32 * width))
    heads -= heads % 2
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=heads * 128, intermediate_size=heads * 448, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), max_position_embeddings=8192, rope_theta=500000.0,
    )  # fmt: skip


def base_in(folder: Path, tokenizer: str, layers: int, width: float, device: str) -> None:
    """Write a base of random weights."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = config_of(-(-len(words) // 64) * 64, layers, width)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="4GB")
    finally:
        torch.set_default_dtype(before)
    words.save_pretrained(folder)


def starts(session: Session, targets: Sequence[str], rank: int, tasks: Sequence[str]) -> list[Adapter]:
    """Plain adapters, B zero, one for each task."""
    with torch.device("meta"):
        config = LlamaConfig.from_pretrained(session.base.name)
        backbone, prefix = backbone_of(AutoModelForCausalLM.from_config(config))
    shapes = {n: m.weight.shape for n, m in backbone.named_modules() if n.endswith(tuple(targets))}
    made = []
    for i, task in enumerate(tasks):
        g = torch.Generator().manual_seed(i)
        factors = {
            n: LoraFactors(torch.randn(rank, s[1], generator=g) / s[1] ** 0.5, torch.zeros(s[0], rank), 2.0)
            for n, s in shapes.items()
        }
        made.append(Adapter(task, session.base.name, factors, prefix=prefix, target_modules=tuple(targets)))
    return made


def measured(session: Session, targets: str, a: argparse.Namespace) -> dict[str, Any]:
    """Train one fleet for a few steps."""
    settings = TrainingSettings(
        steps=a.steps, batch_size=a.batch, max_length=a.length, precision="bf16" if a.device == "cuda" else "fp32"
    )
    cuda = a.device == "cuda"
    with tempfile.TemporaryDirectory(dir=a.work) as folder:
        members = [
            Member(
                s, session.tasks[s.name], session.training(s.name, 0), settings, 0, Path(folder) / s.name,
                identity("train", {"bench": s.name}),
            )
            for s in starts(session, TARGETS[targets], a.rank, a.tasks.split(","))
        ]  # fmt: skip
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seen: list[tuple[int, float]] = []
        began = time.perf_counter()
        train_fleet(members, session.base, progress=lambda done, *_: seen.append((done, time.perf_counter())))
        whole = time.perf_counter() - began
    (first, start), (last, end) = seen[1], seen[-1]  # a report every few steps; the first comes before them
    step = (end - start) / (last - first) * len(members)
    return {
        "targets": targets, "adapters": len(members), "rank": a.rank, "rows": a.batch, "length": a.length, "steps": a.steps,
        "seconds_a_step": round(step, 4), "rows_a_second": round(len(members) * a.batch / step, 1),
        "counted_steps": (last - first) // len(members), "whole_seconds": round(whole, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if cuda else None,
    }  # fmt: skip


def main() -> None:
    """Write the base, train, write what was measured after each fleet."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", required=True, type=Path)
    p.add_argument("--set", action="append", default=[], help="KEY=VALUE of the study")
    p.add_argument("--tokenizer", required=True)
    p.add_argument("--work", required=True, type=Path)
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--device", default="cuda")
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--width", type=float, default=1.0)
    p.add_argument(
        "--tasks",
        default="snli,banking77,clinc_domain,wikisql",
        help="an adapter each; their answers fit into --length",
    )
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--steps", type=int, default=25)
    a = p.parse_args()
    fleet_run.STEPS_BETWEEN_LOOKS = 5
    a.work.mkdir(parents=True, exist_ok=True)
    base = a.work / "base"
    began = time.perf_counter()
    if not (base / "config.json").exists():
        base_in(base, a.tokenizer, a.layers, a.width, a.device)
    print(f"base written in {time.perf_counter() - began:.0f} s", flush=True)
    dtype = "bfloat16" if a.device == "cuda" else "float32"
    recipe = read_recipe(a.study, [*a.set, f"base.model={base}", f"base.dtype={dtype}", f"data.max_length={a.length}"])
    session = Session(recipe)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if a.device == "cuda" else "CPU", "versions": versions(), "layers": a.layers,
        "width": a.width, "rows": [],
    }  # fmt: skip
    for targets in TARGETS:
        report["rows"].append(measured(session, targets, a))
        print(json.dumps(report["rows"][-1]), flush=True)
        a.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
