"""What `merge auto` pays for going on where it was: seconds of a run that is killed in the midst and started again, beside one that is not.

A random BERT of MiniLM's size (6 layers of 384), adapters of rank 3 with heads of 3 classes, texts of random words. Every run is a process
of its own, in one thread; counted are CPU seconds, those of a killed one too.

    PYTHONPATH=src:. python -m benchmarks.resumed
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tests.panels import random_adapter, texts_of
from tests.tiny import save_model

from plait.adapters.peft_format import write_adapter
from plait.choosing import auto_folders
from plait.choosing.auto_settings import AutoSettings
from plait.learning import checkpoints
from plait.model.base import BaseModel
from plait.training.checkpoints import checkpoint_root

SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


def choose(work: Path, names: list[str], texts: int, repair: int, out: Path, keeps: bool) -> None:
    """Make one choice; without keeping, as it was before."""
    torch.set_num_threads(1)
    if not keeps:
        checkpoints.Checkpoints._write = lambda *_: None
    given = {name: texts_of(texts, i) for i, name in enumerate(names)}
    settings = AutoSettings(repair=repair, max_length=32)
    base = BaseModel(str(work / "base"), device="cpu")
    folders = [str(work / name) for name in names]
    auto_folders.merge_auto_folders(folders, out, base=base, texts=given, settings=settings, on_progress=said)


def said(line: str) -> None:
    """Print what a run says of itself, but for its many small steps."""
    if not line.startswith("  "):
        print(f"    {line}", flush=True)


def seconds_of(process: BaseProcess, ended_after: float = float("inf")) -> float:
    """Run a process to its end, or kill it after so many CPU seconds; how many it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process.start()
    while process.is_alive():
        time.sleep(0.05)
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        if (int(fields[11]) + int(fields[12])) / 100 > ended_after:
            process.kill()
            break
    process.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the seconds of each run, and what lies beside the output when one is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--repair", type=int, default=60)
    parser.add_argument(
        "--ended", type=float, nargs="*", default=[0.5, 0.85], help="shares of a run after which it is killed"
    )
    a = parser.parse_args()
    names = [f"task{i}" for i in range(a.adapters)]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        save_model(work / "base", "bert", **SIZES)
        for i, name in enumerate(names):
            adapter = random_adapter(
                BaseModel(str(work / "base"), device="cpu"), "bert", name, "classification", i, size=0.02
            )
            (work / name).mkdir()
            write_adapter(work / name, adapter)

        def process(out: str, keeps: bool = True) -> BaseProcess:
            return context.Process(target=choose, args=(work, names, a.texts, a.repair, work / out, keeps))

        found = {"without": seconds_of(process("without", keeps=False)), "whole": seconds_of(process("whole"))}
        for share in a.ended:
            out = f"ended{share}"
            found[f"killed at {share}"] = seconds_of(process(out), share * found["whole"])
            files = [p for p in checkpoint_root(work / out).rglob("*") if p.is_file()]
            found[f"MB there at {share}"] = sum(p.stat().st_size for p in files) / 1e6
            found[f"gone on from {share}"] = seconds_of(process(out))
            same = all(
                (work / out / p.name).read_bytes() == p.read_bytes() for p in (work / "whole").glob("*.safetensors")
            )
            found[f"same bytes {share}"] = same
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
