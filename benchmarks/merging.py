"""Merging beside PEFT and mergekit: the same eight adapters, one run, ratios to the floor.

    python benchmarks/merging.py --work DIR --prepare
    python benchmarks/merging.py --work DIR --mergekit PYTHON --publish docs/results

The first makes adapters, statistics and bases; the second measures all and writes merging.json and the tables of
merging.md. The disk it takes is 7 GB, and mergekit's caches, which go again, another 20 GB.

The floor reads the eight files and writes one of an input's size, with safetensors alone; it is taken anew
before each of plait's runs, and ratios are to the median over a shape's processes. A second floor, in the row "floor_exact",
writes one of the exact result's size instead, which is that of all eight. "seconds" is the merge alone,
from the first file opened to the last one closed; "seconds_verified" has plait's verification too, which is its default and
which the other tools lack; "process_seconds" is a whole process with its imports (and verification). Peaks are
resident memory above what `import torch` (and for PEFT `import transformers, peft`) takes; mergekit's is its whole memory.
Every tool runs in processes of its own. Runs are repeated --repeats times or until a row has taken --patience seconds;
each row says how many runs its median is of. mergekit lives in another environment: give its Python, or it is left out
and the page says so; it is stopped after --limit seconds, and then its row is a lower bound.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import merging_page as page

SHAPES: dict[str, dict[str, Any]] = {
    "roberta-large": {
        "modules": [
            (f"roberta.encoder.layer.{i}.attention.self.{t}", 1024, 1024) for i in range(24) for t in ("query", "value")
        ]
    },
    "llama-3.2-1b": {
        "modules": [
            (f"model.layers.{i}.self_attn.{t}_proj", out, 2048)
            for i in range(16)
            for t, out in (("q", 2048), ("v", 512))
        ]
    },
}
TARGETS = {"roberta-large": ["query", "value"], "llama-3.2-1b": ["q_proj", "v_proj"]}
TASKS = [f"task{i}" for i in range(8)]
METHODS = (
    *("linear", "cat", "task_arithmetic", "slerp", "svd", "tsv", "iso_c", "core_space", "knots"),
    *("regmean", "ties", "dare_linear", "dare_ties"),
)
DENSE = {"ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "sce", "emr"}
# What each peer is asked for; the dense SVDs of a 2048-wide model take PEFT minutes, so one of them stands for all.
PEFT_METHODS = {
    "roberta-large": ("linear", "cat", "ties", "svd", "ties_svd"),
    "llama-3.2-1b": ("linear", "cat", "ties", "svd"),
}
MERGEKIT_METHODS = {"roberta-large": ("task_arithmetic", "ties"), "llama-3.2-1b": ("task_arithmetic",)}
_PATIENCE = "PLAIT_BENCHMARK_PATIENCE"


# --- the material -------------------------------------------------------------------------------------------------------


def make_adapters(folder: Path, shape: str) -> None:
    import torch

    from plait.adapters.lora import Adapter, LoraFactors
    from plait.adapters.peft_format import write_adapter

    for seed, task in enumerate(TASKS):
        if (folder / task).exists():
            continue
        g = torch.Generator().manual_seed(seed)
        modules = {
            name: LoraFactors(
                torch.randn(8, width, generator=g) / width**0.5, 0.02 * torch.randn(out, 8, generator=g), 2.0
            )
            for name, out, width in SHAPES[shape]["modules"]
        }
        (folder / task).mkdir(parents=True)
        task_type = "CAUSAL_LM" if "llama" in shape else None
        write_adapter(
            folder / task,
            Adapter(task, str(folder / "base"), modules, task_type=task_type, target_modules=tuple(TARGETS[shape])),
        )


def make_base(folder: Path, shape: str) -> None:
    if (folder / "config.json").exists():
        return
    import torch
    import transformers as hf

    torch.manual_seed(0)
    if shape == "roberta-large":
        config = hf.RobertaConfig(
            vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        )
        model = hf.RobertaForMaskedLM(config)
    else:
        # Llama's 128256 words would have mergekit take 23 GB; fewer are only a help to those who need the base.
        config = hf.LlamaConfig(
            vocab_size=32000, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
            head_dim=64, intermediate_size=8192, tie_word_embeddings=True,
        )  # fmt: skip
        model = hf.LlamaForCausalLM(config)
    model.to(torch.float32 if shape == "roberta-large" else torch.bfloat16).save_pretrained(folder)


def make_statistics(folder: Path, shape: str) -> None:
    import torch

    from plait.statistics.files import write_statistics
    from plait.statistics.moments import ModuleInfo, Moments, Statistics

    for seed, task in enumerate(TASKS):
        if (folder / f"{task}.stats.safetensors").exists():
            continue
        g = torch.Generator().manual_seed(seed)
        sites, modules = {}, {}
        for name, out, width in SHAPES[shape]["modules"]:
            site = name.replace("value", "query").replace("v_proj", "q_proj")
            if site not in sites:
                h = torch.randn(width + 64, width, generator=g)
                sites[site] = Moments(len(h), h.sum(0), h.T @ h)
            modules[name] = ModuleInfo(site, (out, width), 1.0)
        folder.mkdir(parents=True, exist_ok=True)
        write_statistics(folder / f"{task}.stats.safetensors", Statistics(sites, modules, {"base": "base"}))


# --- what is measured, each in its own process ----------------------------------------------------------------------------


def peak_mb() -> float:
    """The process's own high-water mark; ru_maxrss would begin at that of the process it was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def repeated(run: Callable[[int], float], repeats: int, baseline: float) -> dict[str, Any]:
    found: list[float] = []
    cpu: list[float] = []
    for i in range(repeats):
        if sum(found) > float(os.environ.get(_PATIENCE, "20")):  # the row says how many runs its median is of
            break
        start = time.process_time()
        found.append(run(i))
        cpu.append(time.process_time() - start)
    return {
        "seconds": statistics.median(found),
        "cpu_seconds": statistics.median(cpu),
        "all": found,
        "peak_mb": peak_mb() - baseline,
    }


def one_floor(folder: Path, out: Path, i: int, exact: bool = False) -> float:
    """Seconds to read the eight files and write one: of an input's size, or of all eight together."""
    from safetensors.torch import load_file, save_file

    start = time.perf_counter()
    read = [load_file(folder / t / "adapter_model.safetensors") for t in TASKS]
    written = {f"{t}.{name}": f for t, one in enumerate(read if exact else read[:1]) for name, f in one.items()}
    save_file(written, out / f"floor{i}.safetensors")
    seconds = time.perf_counter() - start
    (out / f"floor{i}.safetensors").unlink()  # the next process would spend its time on cutting it to length first
    return seconds


def floor(folder: Path, out: Path, repeats: int) -> dict[str, Any]:
    import torch  # noqa: F401

    return repeated(lambda i: one_floor(folder, out, i), repeats, peak_mb())


def floor_exact(folder: Path, out: Path, repeats: int) -> dict[str, Any]:
    """The floor that writes as much as an exact merge does, whose rank is the sum of the eight."""
    import torch  # noqa: F401

    return repeated(lambda i: one_floor(folder, out, i, exact=True), repeats, peak_mb())


def row_block_sum(folder: Path, shape: str, repeats: int) -> dict[str, Any]:
    """The plain sum of the same deltas, row block by row block: what a dense rule cannot do without."""
    import torch

    from plait.adapters.peft_format import read_adapter
    from plait.merging.dense import row_blocks

    baseline = peak_mb()
    adapters = [read_adapter(folder / t) for t in TASKS]

    def run(_: int) -> float:
        start = time.perf_counter()
        for name, out, width in SHAPES[shape]["modules"]:
            factors = [a.modules[name].folded() for a in adapters]
            for i, j in row_blocks((out, width)):
                total = torch.zeros(j - i, width)
                for f in factors:
                    total += f.B[i:j] @ f.A
        return time.perf_counter() - start

    return repeated(run, repeats, baseline)


def plait_dense(folder: Path, method: str, repeats: int) -> dict[str, Any]:
    """A dense rule up to its result, before the cut to rank."""
    import torch  # noqa: F401

    baseline = peak_mb()
    from plait.adapters.peft_format import read_adapter
    from plait.merging import plan_merge
    from plait.merging.dense import DenseDelta

    adapters = [read_adapter(folder / t) for t in TASKS]

    def run(_: int) -> float:
        plan = plan_merge(adapters, method, scale=1.0)
        start = time.perf_counter()
        plan.prepare()

        def blocks(module: str) -> None:
            result = plan.method.function(plan.view(module), **plan.options)
            assert isinstance(result, DenseDelta)
            for _ in result.blocks():
                pass

        plan.each(blocks, list(plan.common.modules))
        return time.perf_counter() - start

    return repeated(run, repeats, baseline)


def plait(folder: Path, method: str, out: Path, repeats: int) -> dict[str, Any]:
    import torch  # noqa: F401

    baseline = peak_mb()
    from plait.merging import merge_folders, merge_methods

    needs = merge_methods()[method].needs
    files = {t: folder / f"{t}.stats.safetensors" for t in TASKS} if needs else None
    tasks = TASKS[:2] if method == "slerp" else TASKS
    verified: list[float] = []
    floors: list[float] = []

    cpu: list[float] = []

    def merged(to: str, verify: bool) -> float:
        start = time.process_time()
        done = merge_folders(
            [folder / t for t in tasks], out / to, method=method, statistics=files, verify=verify, scale=1.0
        )
        cpu.append(time.process_time() - start)
        return float(done.seconds_merge)

    def run(i: int) -> float:
        floors.append(one_floor(folder, out, i))
        alone = merged(f"{method}{i}-alone", False)
        verified.append(merged(f"{method}{i}", True))
        return alone

    found = repeated(run, repeats, baseline)
    size = sum(p.stat().st_size for p in (out / f"{method}0").rglob("*")) / 1e6
    beside = {"seconds_verified": statistics.median(verified), "seconds_floor": statistics.median(floors)}
    beside["cpu_seconds"] = statistics.median(cpu[::2])
    return {**found, **beside, "beyond": sum(found["all"]) + sum(verified[1:]), "disk_mb": size}


def read_statistics_alone(folder: Path, repeats: int) -> dict[str, Any]:
    """What regmean reads beside the adapters; and its solves, everything read."""
    import torch  # noqa: F401

    baseline = peak_mb()
    from plait.adapters.peft_format import read_adapter
    from plait.merging import plan_merge
    from plait.merging.folders import read_statistics_files

    adapters = [read_adapter(folder / t) for t in TASKS]
    solves: list[float] = []

    def run(_: int) -> float:
        start = time.perf_counter()
        read = read_statistics_files({t: folder / f"{t}.stats.safetensors" for t in TASKS})
        seconds = time.perf_counter() - start
        plan = plan_merge(adapters, "regmean", statistics=read, scale=1.0)
        start = time.perf_counter()
        plan.run("solved")
        solves.append(time.perf_counter() - start)
        return seconds

    found = repeated(run, repeats, baseline)
    return {**found, "solve_seconds": statistics.median(solves)}


def peft(folder: Path, method: str, out: Path, repeats: int) -> dict[str, Any]:
    import transformers as hf
    from peft import PeftModel

    baseline = peak_mb()

    def run(i: int) -> float:
        start = time.perf_counter()
        kind = hf.AutoModelForCausalLM if "llama" in folder.name else hf.AutoModelForMaskedLM
        model = PeftModel.from_pretrained(
            kind.from_pretrained(folder / "base"), folder / TASKS[0], adapter_name=TASKS[0]
        )
        for task in TASKS[1:]:
            model.load_adapter(folder / task, adapter_name=task)
        extra = {"density": 0.5} if "ties" in method or "dare" in method else {}
        model.add_weighted_adapter(TASKS, [1.0] * len(TASKS), "merged", combination_type=method, **extra)
        model.save_pretrained(out / f"{method}{i}", selected_adapters=["merged"])
        return time.perf_counter() - start

    found = repeated(run, repeats, baseline)
    size = sum(p.stat().st_size for p in (out / f"{method}0").rglob("*") if p.is_file()) / 1e6
    return {**found, "disk_mb": size}


# --- the run ------------------------------------------------------------------------------------------------------------


def child(*arguments: str, python: str = sys.executable) -> dict[str, Any]:
    start = time.perf_counter()
    done = subprocess.run([python, __file__, "--child", *arguments], capture_output=True, text=True, check=False)
    whole = time.perf_counter() - start
    if done.returncode:
        return {
            "error": done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else f"exit {done.returncode}"
        }
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    runs = found.pop("all", [])
    beyond = found.pop("beyond", sum(runs[1:]))  # what a process that merges once, and verifies, would not do
    return {**found, "process_seconds": whole - beyond, "runs": len(runs)} if found else {}


def mergekit(python: str, folder: Path, method: str, out: Path, limit: float) -> dict[str, Any]:
    """One run: mergekit bakes every adapter into a model of its own before it merges. Its peak is its whole memory."""
    recipe = out / f"{method}.yaml"
    models = "".join(
        f"  - model: {folder / 'base'}+{folder / t}\n    parameters: {{weight: 1.0, density: 0.5}}\n" for t in TASKS
    )
    recipe.write_text(f"models:\n{models}merge_method: {method}\nbase_model: {folder / 'base'}\ndtype: float32\n")
    cache, log = out / "lora-cache", out / "mergekit.log"
    program = str(Path(python).parent / "mergekit-yaml")
    command = [program, str(recipe), str(out / method), "--lora-merge-cache", str(cache), "--no-copy-tokenizer"]
    start = time.perf_counter()
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        stop = threading.Timer(limit, process.kill)
        stop.start()
        _, status, usage = os.wait4(process.pid, 0)
        stop.cancel()
    seconds = time.perf_counter() - start
    code = process.returncode = os.waitstatus_to_exitcode(status)
    size = sum(p.stat().st_size for d in (cache, out / method) for p in d.rglob("*") if p.is_file()) / 1e6
    shutil.rmtree(cache, ignore_errors=True)
    shutil.rmtree(out / method, ignore_errors=True)
    stopped = code < 0 and seconds >= limit
    if code and not stopped:
        return {"error": (log.read_text().strip().splitlines() or [f"exit {code}"])[-1][:300]}
    found = {
        "seconds": seconds,
        "process_seconds": seconds,
        "peak_mb": usage.ru_maxrss / 1024,
        "disk_mb": size,
        "runs": 1,
    }
    return {**found, "stopped": True} if stopped else found


def prepare(args: argparse.Namespace) -> None:
    """Everything that is read: made once, not measured."""
    from plait.merging import merge_methods

    for shape in args.shapes:
        folder = args.work / shape
        make_adapters(folder, shape)
        if any(merge_methods()[m].needs for m in args.methods):
            make_statistics(folder, shape)
        if "peft" in args.tools or args.mergekit or args.prepare:
            make_base(folder / "base", shape)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        folder, out = args.work / shape, args.work / f"{shape}-out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        base = child("floor", str(folder), str(out), str(args.repeats))
        exact = child("floor_exact", str(folder), str(out), str(args.repeats))
        summed = child("row_block_sum", str(folder), shape, str(args.repeats))

        def add(tool: str, method: str, found: dict[str, Any], shape: str = shape) -> None:
            row = {"shape": shape, "tool": tool, "method": method, **found}
            rows.append(row)
            shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
            print(json.dumps(shown), file=sys.stderr, flush=True)

        add("safetensors", "floor", base)
        add("safetensors", "floor_exact", exact)
        add("torch", "row_block_sum", summed)
        for method in args.methods if "plait" in args.tools else ():
            found = child("plait", str(folder), method, str(out), str(args.repeats))
            if method in DENSE and "seconds" in found:
                dense = child("plait_dense", str(folder), method, str(args.repeats))
                found["dense_seconds"], found["dense_peak_mb"] = dense["seconds"], dense["peak_mb"]
                found["over_row_block_sum"] = dense["seconds"] / summed["seconds"]
            add("plait", method, found)
            for i in range(args.repeats):
                shutil.rmtree(out / f"{method}{i}", ignore_errors=True)
        if "plait" in args.tools and "regmean" in args.methods:
            add("plait", "read_statistics", child("read_statistics_alone", str(folder), str(args.repeats)))
        for method in PEFT_METHODS[shape] if "peft" in args.tools else ():
            repeats = 1 if method.endswith("svd") else min(3, args.repeats)
            add("peft", method, child("peft", str(folder), method, str(out), str(repeats)))
            for i in range(repeats):
                for made in (f"{method}{i}", f"{method}{i}-alone"):
                    shutil.rmtree(out / made, ignore_errors=True)
        for method in MERGEKIT_METHODS[shape] if args.mergekit else ():
            add("mergekit", method, mergekit(args.mergekit, folder, method, out, args.limit))
        shutil.rmtree(out, ignore_errors=True)
    over_floor(rows)
    return {"rows": rows, "machine": machine(args), "command": "python benchmarks/merging.py " + spoken(args)}


def over_floor(rows: list[dict[str, Any]]) -> None:
    """Give every row its ratio to the shape's floor: the median over processes, which differ twofold.

    Those that read gigabytes or hold dense deltas push the adapters out of the caches: their floors would flatter.
    """
    for shape in {r["shape"] for r in rows}:
        mine = [r for r in rows if r["shape"] == shape and "seconds" in r]
        floors = [r["seconds_floor"] for r in mine if "seconds_floor" in r and r["method"] not in (*DENSE, "regmean")]
        floors += [r["seconds"] for r in mine if r["method"] == "floor"]
        written = next((r["seconds"] for r in mine if r["method"] == "floor_exact"), None)
        for r in mine:
            r["over_floor"] = r["seconds"] / statistics.median(floors)
            if written:
                r["over_floor_exact"] = r["seconds"] / written
            if "seconds_verified" in r:
                r["over_floor_verified"] = r["seconds_verified"] / statistics.median(floors)


def spoken(args: argparse.Namespace) -> str:
    """The arguments as the page shows them, without the machine's paths."""
    told = f"--work DIR --repeats {args.repeats} --patience {args.patience:g}"
    if args.mergekit:
        told += f" --mergekit PYTHON --limit {args.limit:g}"
    for name, chosen, usual in (("shapes", args.shapes, list(SHAPES)), ("tools", args.tools, ["plait", "peft"])):
        told += f" --{name} {' '.join(chosen)}" if list(chosen) != usual else ""
    return told + (f" --methods {' '.join(args.methods)}" if tuple(args.methods) != METHODS else "")


def machine(args: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    found = {n: version(n) for n in ("torch", "transformers", "peft", "safetensors", "plait")}
    if args.mergekit:
        script = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'), v('transformers'), v('peft'))"
        done = subprocess.run([args.mergekit, "-c", script], capture_output=True, text=True, check=False)
        found["mergekit (mergekit, torch, transformers, peft)"] = done.stdout.strip()
    return {
        "versions": found,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        name, *rest = sys.argv[2:]
        *texts, repeats = rest
        given: list[Any] = [Path(t) if "/" in t else t for t in texts]
        print(json.dumps(globals()[name](*given, int(repeats))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("merging-benchmark"), help="adapters, bases and outputs")
    parser.add_argument("--prepare", action="store_true", help="make what is read, and stop")
    parser.add_argument("--mergekit", help="Python of an environment with mergekit")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds after which mergekit is stopped")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patience", type=float, default=10.0, help="seconds after which a row is not repeated")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tools", nargs="*", default=["plait", "peft"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--publish", type=Path, help="folder of merging.json and merging.md, which are written anew")
    args = parser.parse_args()
    args.work = args.work.absolute()  # arguments of children are told apart from names by their slashes
    os.environ[_PATIENCE] = str(args.patience)
    prepare(args)
    if args.prepare:
        return
    found = measure(args)
    print(page.times(found["rows"]), page.targets(found["rows"]), sep="\n\n")
    if args.publish:
        page.publish(args.publish, found)


if __name__ == "__main__":
    main()
