"""Real servers beside PEFT: vLLM and llama.cpp, in environments of their own that `make test-serving` installs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACE = Path(os.environ.get("PLAIT_SERVING", ROOT / ".serving"))
BASE = PLACE / "base"
LIMITS = {"vllm": ("max_logprob_diff", 1e-4), "llama.cpp": ("max_prob_diff", 1e-2)}
INSTALLED = {
    "vllm": (PLACE / "vllm" / "bin" / "python",),
    "llama.cpp": (PLACE / "llama.cpp" / "node_modules" / "node-llama-cpp", PLACE / "llama.cpp" / "source"),
}
ADAPTERS = {"reviews", "travel", "rslora", "patterns"}
MERGES = {f"merged by {m}" for m in ("task_arithmetic", "ties", "tsv")} | {"merged, different ranks"}


def rows(server: str) -> dict[str, dict]:
    """What one server gave, by folder: the whole of benchmarks/serving for it."""
    if missing := [p for p in (*INSTALLED[server], BASE / "model.safetensors") if not p.exists()]:
        pytest.skip(f"{missing[0]} is missing: make test-serving installs it")
    if server == "llama.cpp" and shutil.which("node") is None:
        pytest.skip("node is not installed")
    out = PLACE / f"{server}.json"
    command = [sys.executable, ROOT / "benchmarks" / "serving", "--base", BASE, "--work", PLACE / "work"]
    command += ["--environments", PLACE, "--servers", server, "--json", out]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {r["folder"]: r for r in json.loads(out.read_text())["rows"]}


def assert_right(found: dict[str, dict], names: set[str], server: str) -> None:
    measure, limit = LIMITS[server]
    for name in names:
        row = found[name]
        assert row[measure] <= limit and row["first_token_equal"] == row["prompts"] == 12, row
        assert name == "base" or (row["moved"] > 10 * limit and row["check"]["exit"] == 0), row


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_vllm_gives_what_peft_gives():
    found = rows("vllm")
    exported = {f"{n}, exported" for n in ("patterns", "rslora", "merged, different ranks")}
    assert_right(found, {"base"} | ADAPTERS | MERGES | exported, "vllm")
    for name in ("dora", "lora_bias"):
        assert found[name]["refused"] and found[name]["check"]["verdict"] == "refuses it", found[name]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_llama_cpp_gives_what_peft_gives():
    found = rows("llama.cpp")
    exported = {f"{n}, exported" for n in {"reviews", "patterns", "rslora"} | MERGES}
    assert_right(
        found,
        {"base", "reviews, converted by llama.cpp", "merged by tsv, converted by llama.cpp"} | exported,
        "llama.cpp",
    )
    for name in ("dora", "lora_bias"):
        row = found[f"{name}, converted by llama.cpp"]
        assert row["refused"] and row["check"]["verdict"] == "refuses it", row
    # The converter knows neither rsLoRA nor alpha patterns: a folder is then loaded as something else, and `check` says so.
    for name in ("rslora", "patterns"):
        row = found[f"{name}, converted by llama.cpp"]
        assert row["max_prob_diff"] > 1e-2 and row["check"]["verdict"] == "loads something else", row
