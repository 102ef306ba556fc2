"""Merging adapters of an 8 B model, all linear layers, on a GPU: seconds of every first-tier method beside reading and writing.

    python benchmarks/merging_8b.py --work DIR --device cuda --out FILE.json

Eight random adapters in the shape of Llama-3-8B (32 layers, q, k, v, o, gate, up and down, rank 16, bfloat16) are made in DIR.
Each method is one process, `plait merge ... --json`, verified as by default. The floor reads the inputs and writes as many bytes
as the result has, flushed, with safetensors alone. "process" is the wall time of the process with its imports, "merge" the
record's `seconds_merge`, "peak_mb" its resident memory. Memory on the GPU is not measured, and RegMean is left out: second
moments of all linear layers of such a model would be 26 GB a task for down_proj alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336),
}  # fmt: skip
METHODS: dict[str, list[str]] = {
    "task_arithmetic": [], "linear": ["--method", "linear"], "cat": ["--method", "cat"],
    "svd": ["--method", "svd", "--rank", "16"], "tsv": ["--method", "tsv"], "iso_c": ["--method", "iso_c"],
    "core_space": ["--method", "core_space"], "knots": ["--method", "knots"],
    "task_arithmetic + pico": ["--calibrate", "pico"], "ties": ["--method", "ties"], "dare_ties": ["--method", "dare_ties"],
}  # fmt: skip


def make(folder: Path, count: int, layers: int, rank: int, width: float, only: tuple[str, ...]) -> list[Path]:
    import torch
    from safetensors.torch import save_file

    paths = []
    for seed in range(count):
        path = folder / f"task{seed}"
        paths.append(path)
        if (path / "adapter_config.json").exists():
            continue
        path.mkdir(parents=True)
        g = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(layers):
            for name in only:
                out, inner = (max(rank, int(n * width)) for n in SIZES[name])
                key = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{key}.lora_A.weight"] = (torch.randn(rank, inner, generator=g) / inner**0.5).bfloat16()
                tensors[f"{key}.lora_B.weight"] = (torch.randn(out, rank, generator=g) / 100).bfloat16()
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "llama-3-8b", "r": rank,
            "lora_alpha": 2 * rank, "target_modules": sorted({n.rpartition(".")[2] for n in only}),
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(config))
    return paths


def floor(paths: list[Path], out: Path, size: int) -> float:
    """Seconds to read the inputs and to write and flush that many bytes."""
    import torch
    from safetensors.torch import load_file, save_file

    started = time.perf_counter()
    for path in paths:
        load_file(path / "adapter_model.safetensors")
    save_file({"x": torch.zeros(size, dtype=torch.uint8)}, out)
    with out.open("rb") as f:
        os.fsync(f.fileno())
    return time.perf_counter() - started


def measure(name: str, options: list[str], paths: list[Path], work: Path, device: str, repeats: int) -> dict[str, Any]:
    best: dict[str, Any] | None = None
    for _ in range(repeats):
        out = work / "merged"
        command = [sys.executable, "-P", "-m", "plait", "merge", *map(str, paths), *options]
        command += ["--device", device, "--out", str(out), "--overwrite", "--json"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            return {"method": name, "error": (done.stdout + done.stderr)[-400:]}
        record = json.loads(done.stdout)
        size = (out / "adapter_model.safetensors").stat().st_size
        row = {
            "method": name, "device": device, "process": wall, "merge": record["seconds_merge"],
            "verify": record.get("seconds_verify"), "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "peak_mb": after.ru_maxrss / 1024, "written_mb": size / 1e6, "read_and_write": floor(paths, work / "floor.safetensors", size),
        }  # fmt: skip
        best = row if best is None or row["merge"] < best["merge"] else best
    assert best is not None
    return best | {"ratio": best["merge"] / best["read_and_write"]}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", required=True, type=Path)
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--device", default="cuda")
    p.add_argument("--adapters", type=int, default=8)
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--width", type=float, default=1.0, help="a fraction of every width, to try the script")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--limit", type=float, default=400, help="begin no method after so many seconds")
    p.add_argument("--only", default="", help="methods, separated by commas")
    p.add_argument("--targets", default="all", help="all, or qv")
    a = p.parse_args()
    started = time.perf_counter()
    only = tuple(SIZES) if a.targets == "all" else ("self_attn.q_proj", "self_attn.v_proj")
    paths = make(a.work / f"{a.targets}-{a.layers}", a.adapters, a.layers, a.rank, a.width, only)
    rows = []
    for name, options in METHODS.items():
        if (a.only and name not in a.only.split(",")) or time.perf_counter() - started > a.limit:
            continue
        rows.append({"targets": a.targets, **measure(name, options, paths, a.work, a.device, a.repeats)})
        print(json.dumps(rows[-1]), flush=True)
        a.out.write_text(
            json.dumps({"settings": {k: str(v) for k, v in vars(a).items()}, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
