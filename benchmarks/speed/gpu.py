"""Merging adapters of an 8 B model on a GPU: seconds of reading, merging and writing, and memory, of every first-tier method.

    PYTHONPATH=src python -P benchmarks/speed/gpu.py --work DIR --out FILE.json [--device cuda]

Eight random adapters in the shape of Llama-3-8B (rank 16, bfloat16), of all linear layers and of q and v alone, are made in DIR.
Each method is one process, so that its peaks are its own: it imports, starts the device, reads the folders, merges in memory (results
come back to the CPU), and writes a flushed folder in the dtype of the inputs. Nothing is verified. RegMean's second moments are random and
made on the device, module by module, where files would hold 40 GB a task; the seconds of making them are not in its merging. `beside`
is reading and writing, and `ratio` merging over it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336),
}  # fmt: skip
# What reads one input, and so shares its moments.
SITES = {"q_proj": "attn", "k_proj": "attn", "v_proj": "attn", "gate_proj": "mlp", "up_proj": "mlp"}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"}, "cat": {"method": "cat"}, "task_arithmetic": {"method": "task_arithmetic"},
    "svd": {"method": "svd", "rank": 16}, "pico": {"method": "task_arithmetic", "calibrate": "pico"}, "tsv": {"method": "tsv"},
    "iso_c": {"method": "iso_c"}, "core_space": {"method": "core_space"}, "knots": {"method": "knots"}, "regmean": {"method": "regmean"},
    "ties": {"method": "ties"}, "dare_ties": {"method": "dare_ties"},
}  # fmt: skip
ABOUT = """
Eight random adapters in the shape of Llama-3-8B, rank 16, bfloat16, made there. Each method is a process of its own. *Merging* goes from
factors in the memory of the CPU to merged factors there, device and all; nothing is verified. Results are written flushed. RegMean's second
moments are random and made on the device, module by module, where files would hold 40 GB a task. DARE draws its masks on the CPU, so that
they are the same on every device. Importing torch and starting the device take each process"""
ORDER = [(m, "all") for m in METHODS if "ties" not in m] + [
    (m, s) for s in ("qv", "all") for m in ("ties", "dare_ties")
]


def make(folder: Path, targets: str, a: argparse.Namespace) -> None:
    """Random adapters, made on the device."""
    import torch
    from safetensors.torch import save_file

    only = [n for n in SIZES if targets == "all" or n.rpartition(".")[2] in ("q_proj", "v_proj")]
    for seed in range(a.adapters):
        path = folder / f"task{seed}"
        if (path / "adapter_config.json").exists():
            continue
        path.mkdir(parents=True)
        g = torch.Generator(a.device).manual_seed(seed)
        tensors = {}
        for layer in range(a.layers):
            for name in only:
                out, inner = (max(a.rank, int(n * a.width)) for n in SIZES[name])
                key = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(a.rank, inner, generator=g, device=a.device) / inner**0.5
                tensors[f"{key}.lora_B.weight"] = torch.randn(out, a.rank, generator=g, device=a.device) / 100
        stored = {k: v.bfloat16().cpu() for k, v in tensors.items()}
        save_file(stored, path / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "llama-3-8b", "r": a.rank,
            "lora_alpha": 2 * a.rank, "target_modules": sorted(n.rpartition(".")[2] for n in only),
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(config))


class Moments:
    """Random moments of one task, made on the device when they are asked for; modules that read one input share them."""

    spent = 0.0

    def __init__(self, task: int, widths: dict[str, int], device: str) -> None:
        self.task, self.widths, self.device = task, widths, device
        self.last: dict[str, tuple[str, Any]] = {}
        self.provenance: dict[str, Any] = {}
        self.sha256 = ""

    def moments_for(self, module: str) -> Any:
        """What a merge asks statistics for."""
        import torch

        from plait.statistics.moments import Moments as Dense

        started = time.perf_counter()
        where, _, name = module.rpartition(".")
        kind = SITES.get(name, name)
        if self.last.get(kind, ("",))[0] != where:
            self.last.pop(kind, None)
            d = self.widths[module]
            g = torch.Generator(self.device).manual_seed(self.task)
            h = torch.randn(256, d, generator=g, device=self.device)
            second = h.T @ h
            second.diagonal().add_(1.0)
            self.last[kind] = (where, Dense(256, h.sum(0), second))
            _wait(self.device)
        Moments.spent += time.perf_counter() - started
        return self.last[kind][1]


def _wait(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def one(method: str, targets: str, a: argparse.Namespace) -> dict[str, Any]:
    """One method in this process."""
    started = time.perf_counter()
    import torch

    from plait.adapters.peft_format import write_adapter
    from plait.merging.folders import read_all, rounding_of
    from plait.merging.planning import plan_merge

    imported = time.perf_counter()
    seed = torch.eye(64, device=a.device)
    torch.linalg.qr(seed @ seed + torch.linalg.eigh(seed.double())[1].float())
    _wait(a.device)
    began = time.perf_counter()
    adapters = read_all([a.work / targets / f"task{i}" for i in range(a.adapters)])
    read = time.perf_counter()
    statistics = None
    if method == "regmean":
        widths = {m: f.shape[1] for m, f in adapters[0].modules.items()}
        statistics = {x.name: Moments(i, widths, a.device) for i, x in enumerate(adapters)}
    plan = plan_merge(adapters, scale=0.5, device=a.device, statistics=statistics, **METHODS[method])
    result = plan.run("merged", rounding_of(plan, "keep"))
    _wait(a.device)
    merged = time.perf_counter()
    folder = a.work / "merged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_adapter(folder, result.adapter)
    file = folder / "adapter_model.safetensors"
    with file.open("rb") as f:
        os.fsync(f.fileno())
    done = time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_SELF)
    on_device = torch.cuda.max_memory_allocated() / 1e6 if a.device.startswith("cuda") else None
    seconds = merged - read - Moments.spent
    beside = read - began + done - merged
    return {
        "what": f"{method} of {a.adapters} adapters, Llama-3-8B r{a.rank}, {'all linear' if targets == 'all' else 'q and v'}",
        "command": f"benchmarks/speed/gpu.py --only {method}:{targets}", "seconds": seconds, "cpu": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss / 1024, "written_mb": file.stat().st_size / 1e6, "beside": "reading and writing",
        "ratio": seconds / beside,
        "importing": imported - started, "starting": began - imported, "reading": read - began, "writing": done - merged,
        "moments": Moments.spent, "device_mb": on_device, "rank": result.record.rank,
    }  # fmt: skip


def page(report: dict[str, Any], command: str) -> str:
    """The page beside OUT: a line for each method."""
    head = [
        "what",
        "merging, s",
        "reading and writing, s",
        "ratio",
        "making moments (not in it), s",
        "memory of the device, MB",
        "of the CPU, MB",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in report["rows"]:
        if "error" in r:
            lines.append(f"| {r['what']} | {r['error'].splitlines()[-1]} |" + " |" * 5)
            continue
        device = f"{r['device_mb']:.0f}" if r["device_mb"] is not None else ""
        beside, moments = r["reading"] + r["writing"], f"{r['moments']:.1f}" if r["moments"] else ""
        cells = [
            r["what"],
            f"{r['seconds']:.1f}",
            f"{beside:.1f}",
            f"{r['ratio']:.1f}",
            moments,
            device,
            f"{r['peak_mb']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    started = [r["importing"] + r["starting"] for r in report["rows"] if "error" not in r]
    machine = f"{report['device']}, torch {report['torch']}, {report['cores']} cores."
    about = f"{machine} {' '.join(ABOUT.split())} {min(started):.1f} to {max(started):.1f} s."
    return (
        "\n".join(["# Merging adapters of an 8 B model on a GPU", "", about, "", f"    {command}", "", *lines]) + "\n"
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", required=True, type=Path)
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--device", default="cuda")
    p.add_argument("--adapters", type=int, default=8)
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--width", type=float, default=1.0, help="a fraction of every width, to try the script")
    p.add_argument(
        "--limit", type=float, default=440, help="seconds for everything; a method that exceeds what is left is stopped"
    )
    p.add_argument("--only", default="", help="METHOD:all or METHOD:qv, separated by commas")
    p.add_argument("--child", default="", help=argparse.SUPPRESS)
    return p


def main() -> None:
    started, a = time.perf_counter(), parser().parse_args()
    if a.child:
        method, targets = a.child.split(":")
        print(json.dumps(one(method, targets, a)))
        return
    import torch

    a.work.mkdir(parents=True, exist_ok=True)
    for targets in ("all", "qv"):
        make(a.work / targets, targets, a)
    name = torch.cuda.get_device_name() if a.device.startswith("cuda") else "CPU"
    about = {
        "device": name,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "seconds of making inputs": time.perf_counter() - started,
    }
    rows: list[dict[str, Any]] = []
    for method, targets in ORDER:
        if a.only and f"{method}:{targets}" not in a.only.split(","):
            continue
        left = a.limit - (time.perf_counter() - started)
        what = {"what": f"{method}, {targets}"}
        try:
            command = [sys.executable, "-P", *sys.argv, "--child", f"{method}:{targets}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(1.0, left))
            rows.append(
                json.loads(done.stdout.splitlines()[-1])
                if done.returncode == 0
                else what | {"error": done.stderr[-600:]}
            )
        except subprocess.TimeoutExpired:
            rows.append(what | {"error": f"not finished in the {left:.0f} s that were left"})
        print(json.dumps(rows[-1]), flush=True)
        report = about | {"rows": rows}
        a.out.write_text(json.dumps(report, indent=1) + "\n")
        options = f" --device {a.device}" if a.device != "cuda" else ""
        command = f"PYTHONPATH=src python -P benchmarks/speed/gpu.py --work DIR --out {a.out.name} --limit {a.limit:g}{options}"
        a.out.with_suffix(".md").write_text(page(report, command))
    if fallen := [r["what"] for r in rows if "Error" in r.get("error", "")]:
        sys.exit(f"ended in an error: {'; '.join(fallen)}")


if __name__ == "__main__":
    main()
