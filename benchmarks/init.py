"""Statistics and subspaces against the bare forward passes over the same tokens, and beside EVA and CorDA.

    python benchmarks/init.py cpu            RoBERTa-large shape, 8 tasks x 100 samples x 128 tokens, 2 cores
    python benchmarks/init.py peers          the same shape, 16 x 128 tokens, EVA and CorDA beside
    python benchmarks/init.py gpu            Llama-3-8B geometry in bf16, random weights
    torchrun --nproc-per-node 2 benchmarks/init.py ranks

Sizes can be cut (`--layers 2 --samples 4`, or `--tiny` for seconds on a CPU), to try a command before it is run in full.
`--json FILE` adds the rows. `gpu --parts solver` times the pieces of one site's solution.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import platform
import statistics as middle
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.statistics import collect_statistics
from plait.statistics.distributed import own_share
from plait.statistics.moments import Moments
from plait.subspaces import compute_subspaces, find_subspace_method, stream_subspaces
from plait.subspaces.compute import solve_site
from plait.subspaces.contrastive import inverse_factor
from plait.subspaces.inputs import SiteInputs
from plait.subspaces.solvers import orthonormal

BUSY = "cpu seconds: "  # of the process: on a machine that others use too, the steadier figure
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Batches = dict[str, list[dict[str, Tensor]]]


def main() -> None:
    options = arguments()
    rows = {"cpu": cpu, "peers": peers, "gpu": gpu, "ranks": ranks}[options.what](options)
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.json and rows:
        path = Path(options.json)
        found = json.loads(path.read_text()) if path.exists() else {"schema": 1, "rows": []}
        found["rows"] += rows
        path.write_text(json.dumps(found, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cpu", "peers", "gpu", "ranks"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int, help="hidden size, to try things out")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, help="examples in a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", default="qv,osrm,all,qv24,all24", help="of gpu: any of these, and solver")
    parser.add_argument("--group", type=int, help="layers in a group, for q+v")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json")
    parser.add_argument("--tiny", action="store_true", help="a shape of seconds, on the CPU")
    options = parser.parse_args()
    if options.tiny:
        small = {"layers": 5, "width": 320, "tasks": 3, "samples": 6, "length": 64, "repeats": 1, "device": "cpu"}
        vars(options).update(small)
    return options


# --- the CPU ----------------------------------------------------------------------------------------------------------


def roberta(options: argparse.Namespace) -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    width = options.width or 1024
    config = RobertaConfig(
        vocab_size=50265,
        hidden_size=width,
        num_hidden_layers=options.layers or 24,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=514,
    )
    return RobertaModel(config, add_pooling_layer=False).eval()


def cpu(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the whole job; forward and collection alternate task by task, so that both meet the same machine."""
    model = roberta(options)
    batches = random_batches(options, 50265, options.batch or 16, "cpu")
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.repeats):
        parts: dict[str, float] = defaultdict(float)
        found = {}
        for task, given in batches.items():
            with timed(parts, "forward"):
                bare_forward(model, given)
            with timed(parts, "statistics"):
                found[task] = collect_statistics(model, given, ["query", "value"], stop_early=False)
        with timed(parts, "contrastive"):
            compute_subspaces("contrastive", found)
        for part, value in parts.items():
            seconds[part].append(value)
        print({k: round(v, 2) for k, v in parts.items()}, file=sys.stderr, flush=True)
    shape = f"RoBERTa-large shape, {len(model.encoder.layer)} layers, {describe(options)}"
    return rows_of(seconds, shape, total=("statistics", "contrastive"))


def peers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """EVA and CorDA from PEFT, and plait, on 16 x 128 tokens."""
    options.samples, options.tasks = 16, 1
    given = random_batches(options, 50265, options.batch or 16, "cpu")["task0"]
    seconds: dict[str, list[float]] = defaultdict(list)
    model = roberta(options)
    bare_forward(model, given)
    for _ in range(options.repeats):
        for tool, job in {
            "forward": bare_forward,
            "plait statistics": plain_collect,
            "CorDA": corda,
            "EVA": eva,
        }.items():
            fresh = model if tool in ("forward", "plait statistics") else roberta(options)
            parts: dict[str, float] = {}
            with timed(parts, tool):
                job(fresh, given)
            for part, value in parts.items():
                seconds[part].append(value)
            print({k: round(v, 2) for k, v in parts.items()}, file=sys.stderr, flush=True)
    return rows_of(seconds, f"RoBERTa-large shape, {len(model.encoder.layer)} layers, 16 x {options.length} tokens")


def plain_collect(model: nn.Module, given: list[dict[str, Tensor]]) -> None:
    collect_statistics(model, given, ["query", "value"], stop_early=False)


def eva(model: nn.Module, given: list[dict[str, Tensor]]) -> None:
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    config = LoraConfig(r=8, target_modules=["query", "value"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
    # EVA needs as many batches as it takes to converge; the same tokens are given to it, one example a batch.
    singles = [{k: v[i : i + 1] for k, v in b.items()} for b in given for i in range(len(b["input_ids"]))]
    initialize_lora_eva_weights(peft_model, singles, show_progress_bar=False)


def corda(model: nn.Module, given: list[dict[str, Tensor]]) -> None:
    # PEFT's module imports `attr` for one decorator and does not depend on it.
    sys.modules.setdefault("attr", types.ModuleType("attr")).__dict__.setdefault("dataclass", dataclasses.dataclass)
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = LoraConfig(r=8, target_modules=["query", "value"], init_lora_weights="corda", corda_config=CordaConfig())

    @torch.no_grad()
    def run() -> None:  # CorDA breaks at batch sizes above 1
        for batch in given:
            for i in range(len(batch["input_ids"])):
                model(**{k: v[i : i + 1] for k, v in batch.items()})

    preprocess_corda(model, config, run_model=run)


# --- one GPU ----------------------------------------------------------------------------------------------------------


def llama(options: argparse.Namespace, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    width = options.width or 4096
    config = LlamaConfig(
        vocab_size=128256 if width == 4096 else 512,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=options.layers or 32,
        num_attention_heads=max(2, width // 128),
        num_key_value_heads=max(1, width // 512),
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaModel(config).eval()
    finally:
        torch.set_default_dtype(before)


def gpu(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Llama-3-8B geometry: q+v in one group, then all-linear in groups, then both within 24 GB and the base offloaded."""
    device = options.device
    start = time.perf_counter()
    model = llama(options, device)
    batches = random_batches(options, model.config.vocab_size, options.batch or options.samples, device)
    layers = len(model.layers)
    shape = f"Llama-3-8B geometry, {layers} layers, {describe(options)}"
    print(f"model after {time.perf_counter() - start:.1f} s", flush=True)
    bare_forward(model, batches["task0"])
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.repeats):
        parts: dict[str, float] = {}
        with timed(parts, "forward"):
            for given in batches.values():
                bare_forward(model, given)
        for part, value in parts.items():
            seconds[part].append(value)
    print("forward", seconds["forward"], flush=True)
    forward = middle.median(seconds["forward"])
    rows = rows_of(seconds, shape)
    jobs = {  # name: method, targets, layers in a group, memory in GB, base on the CPU, repeats
        "qv": ("contrastive", ["q_proj", "v_proj"], options.group or 4, None, False, options.repeats),
        "osrm": ("osrm", ["q_proj", "v_proj"], layers, None, False, 1),
        "all": ("contrastive", LINEAR, 3, 60, False, 1),
        "qv24": ("contrastive", ["q_proj", "v_proj"], 4, 24, True, 1),
        "all24": ("contrastive", LINEAR, 1, 24, True, 1),
    }
    jobs |= {f"qv-{n}": (*jobs["qv"][:2], n, *jobs["qv"][3:]) for n in (1, 2, 8)}  # other groups, to choose by
    for name in filter(None, options.parts.split(",")):
        if name == "solver":
            rows.append(pieces(options, shape, device))
            continue
        try:
            rows += streamed(name, model, batches, shape, forward, device, *jobs[name])
        except torch.OutOfMemoryError as e:
            print(f"{name}: {e}", flush=True)
    return rows


def streamed(
    name: str,
    model: nn.Module,
    batches: Batches,
    shape: str,
    forward: float,
    device: str,
    method: str,
    targets: list[str],
    group: int,
    memory: int | None,
    offloaded: bool,
    repeats: int,
) -> list[dict[str, Any]]:
    if offloaded and next(model.parameters()).device.type != "cpu":
        model.to("cpu")
    limit(memory, device)
    seconds: dict[str, list[float]] = defaultdict(list)
    found = None
    for _ in range(repeats):
        parts: dict[str, float] = defaultdict(float)
        with timed(parts, "total"):
            found = stream_subspaces(
                method,
                model,
                batches,
                targets,
                group=group,
                device=device,
                observe=lambda p, s, d=parts: d.__setitem__(p, d[p] + s),
            )
        for part, value in parts.items():
            seconds[part].append(value)
    assert found is not None
    records = [s.record for of in found.subspaces.values() for s in of.values()]
    extra = {
        "targets": "q+v" if len(targets) == 2 else "all-linear",
        "layers_in_a_group": group,
        "base": "on the CPU, brought layer by layer" if offloaded else "on the GPU",
        "limit_gb": memory,
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if device != "cpu" else None,
        "parts": {k: round(middle.median(v), 3) for k, v in seconds.items() if not k.startswith(BUSY)},
        "solver": sorted({str(r["solver"]) for r in records}),
        "first": round(seconds["total"][0], 3),
        "steps": middle.median(r.get("steps", 0) for r in records),
    }
    total = middle.median(seconds["total"])
    row = row_of(f"plait {method} ({name})", shape, total, forward) | extra
    print(json.dumps(row), flush=True)
    return [row]


def pieces(options: argparse.Namespace, shape: str, device: str) -> dict[str, Any]:
    """Milliseconds of everything that one site of all tasks takes, each piece alone, warm, median of 5."""
    d, tasks, columns = options.width or 4096, options.tasks, 16
    generator = torch.Generator(device).manual_seed(0)
    scales = torch.logspace(0, -2, d, device=device)
    sums = []
    for _ in range(tasks):
        H = torch.randn(3 * d, d, generator=generator, device=device)
        H[:, torch.randint(d, (d // 16,), generator=generator, device=device)] *= 3
        H *= scales
        sums.append(H.T @ H)
    moments = {f"task{i}": Moments(3 * d, S[0], S) for i, S in enumerate(sums)}
    inputs = SiteInputs("site", d, 8, tuple(moments), moments, device=torch.device(device))
    P, c = inputs.pencil()
    P.diagonal().add_(c * 0.1 / d)
    whitener = inverse_factor(P)
    own = torch.stack([inputs.own(t) for t in moments])
    Y = torch.randn(tasks, d, columns, generator=generator, device=device, dtype=torch.float64)
    V = orthonormal(torch.randn(tasks, d, 5 * columns, generator=generator, device=device, dtype=torch.float64))
    H = torch.eye(6 * columns, dtype=torch.float64).expand(tasks, -1, -1) + (V.mT @ V)[0, 0, 0].item() * 1e-3
    method = find_subspace_method("contrastive")
    jobs: dict[str, Callable[[], Any]] = {
        "pencil": inputs.pencil,
        "own moments": lambda: [inputs.own(t) for t in moments],
        "cholesky": lambda: torch.linalg.cholesky_ex(P),
        "cholesky and inverse": lambda: inverse_factor(P),
        "own @ block": lambda: own @ Y,
        "whitener @ blocks": lambda: whitener @ Y.transpose(0, 1).reshape(d, -1),
        "orthonormal block": lambda: orthonormal(Y, V),
        "ritz on the CPU": lambda: torch.linalg.eigh(H),
        "the whole site": lambda: solve_site(method, inputs, {"rho": 0.1}, None),
    }
    if device != "cpu":
        there = H.to(device).contiguous()
        jobs["ritz on the GPU"] = lambda: torch.linalg.eigh(there)
    milliseconds = {}
    for name, job in jobs.items():
        times: list[float] = []
        for _ in range(6):
            parts: dict[str, float] = {}
            with timed(parts, name):
                job()
            times.append(1000 * parts[name])
        milliseconds[name] = round(middle.median(times[1:]), 3)
    steps = solve_site(method, inputs, {"rho": 0.1}, None)["task0"].record["steps"]
    row = row_of("pieces of one site", shape, milliseconds["the whole site"] / 1000, 1.0)
    row = row | {"over_forward": None, "milliseconds": milliseconds, "steps": steps}
    print(json.dumps(row), flush=True)
    return row


def limit(memory: int | None, device: str) -> None:
    if device == "cpu":
        return
    gc.collect()
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory * 1e9 / whole) if memory else 1.0)
    torch.cuda.reset_peak_memory_stats()


# --- several ranks ----------------------------------------------------------------------------------------------------


def ranks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One set of statistics of all tokens, by every rank alone and by all together."""
    import torch.distributed as dist

    on_gpu = options.device != "cpu"
    rank = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = f"cuda:{rank}" if on_gpu else "cpu"
    model = llama(options, device)
    size = options.batch or 50
    given = [b for of in random_batches(options, model.config.vocab_size, size, device).values() for b in of]
    collect = collector_of(model, device)
    collect(given[:2], distributed=False)
    collect(given[rank : rank + 1], distributed=True)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.repeats):
        for name, distributed in (("one rank", False), ("all ranks", True)):
            parts: dict[str, float] = {}
            dist.barrier()
            with timed(parts, name):
                found = collect(list(own_share(given)) if distributed else given, distributed=distributed)
            seconds[name].append(parts[name])
            if not distributed:
                alone = found
    worst = max(float((found.sites[s].second - m.second).norm() / m.second.norm()) for s, m in alone.sites.items())
    shape = f"Llama-3-8B geometry, {len(model.layers)} layers, {describe(options)}, q+v, statistics"
    one, many = (middle.median(seconds[k]) for k in ("one rank", "all ranks"))
    world = dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    if rank:
        return []
    row = {"machine": machine(), "shape": shape, "tool": f"plait on {world} ranks", "seconds": round(many, 3)}
    return [row | {"one_rank": round(one, 3), "speedup": round(one / many, 3), "relative_difference": worst}]


def collector_of(model: nn.Module, device: str) -> Callable[..., Any]:
    def collect(given: list[dict[str, Tensor]], *, distributed: bool) -> Any:
        return collect_statistics(model, given, ["q_proj", "v_proj"], distributed=distributed, result_device=device)

    return collect


# --- shared -----------------------------------------------------------------------------------------------------------


def random_batches(options: argparse.Namespace, words: int, size: int, device: str) -> Batches:
    """Random full-length tokens; each task draws from words of its own frequencies, so that tasks differ."""
    batches: Batches = {}
    for number in range(options.tasks):
        generator = torch.Generator().manual_seed(number)
        chance = torch.rand(words, generator=generator) ** 4
        ids = torch.multinomial(chance, options.samples * options.length, replacement=True, generator=generator)
        ids = ids.view(options.samples, options.length).to(device)
        mask = torch.ones(ids.shape, dtype=torch.long)  # on the CPU: counting it must not wait for the GPU
        cuts = range(0, options.samples, size)
        batches[f"task{number}"] = [
            {"input_ids": ids[i : i + size], "attention_mask": mask[i : i + size]} for i in cuts
        ]
    return batches


@torch.no_grad()
def bare_forward(model: nn.Module, given: list[dict[str, Tensor]]) -> None:
    extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    for batch in given:
        model(**{k: v.to(model.device) for k, v in batch.items()}, **extra)


@contextlib.contextmanager
def timed(parts: dict[str, float], name: str) -> Iterator[None]:
    gc.collect()
    wait()
    start, busy = time.perf_counter(), time.process_time()
    yield
    wait()
    parts[name] = parts.get(name, 0.0) + time.perf_counter() - start
    parts[BUSY + name] = parts.get(BUSY + name, 0.0) + time.process_time() - busy


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rows_of(seconds: dict[str, list[float]], shape: str, total: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    tools = {tool: (tool,) for tool in seconds if not tool.startswith(BUSY)}
    if total:
        tools[" + ".join(total)] = total
    return [summed(tool, parts, seconds, shape) for tool, parts in tools.items()]


def summed(tool: str, parts: tuple[str, ...], seconds: dict[str, list[float]], shape: str) -> dict[str, Any]:
    """Medians over the repeats, each compared with its own repeat's forward passes."""

    def ratio(prefix: str) -> float:
        sums = [sum(values) for values in zip(*(seconds[prefix + p] for p in parts), strict=True)]
        return middle.median(s / f for s, f in zip(sums, seconds[prefix + "forward"], strict=True))

    row = row_of(tool, shape, sum(middle.median(seconds[p]) for p in parts), middle.median(seconds["forward"]))
    return row | {"over_forward": round(ratio(""), 3), "cpu_over_forward": round(ratio(BUSY), 3)}


def row_of(tool: str, shape: str, seconds: float, forward: float) -> dict[str, Any]:
    return {
        "machine": machine(),
        "shape": shape,
        "tool": tool,
        "seconds": round(seconds, 3),
        "over_forward": round(seconds / forward, 3),
    }


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def describe(options: argparse.Namespace) -> str:
    return f"{options.tasks} tasks x {options.samples} x {options.length} tokens"


if __name__ == "__main__":
    main()
