"""A collection that was killed in the middle goes on after its last finished shard, and nothing of it shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plait.cli import main
from plait.runs import collecting
from plait.statistics import collect_shards, open_statistics, read_statistics
from tests.conftest import tiny_rows, write_rows
from tests.statistics.models import batches, build

ROOT = Path(__file__).parents[2]
CHILD = """
import os, signal, sys
from plait.statistics import collect_shards
from tests.statistics.models import batches, build
given = batches("roberta", 2, examples=12)
def die():
    yield given[2]
    os.kill(os.getpid(), signal.SIGKILL)  # after forward passes, before the shard is whole
shards = [lambda: [given[0]], lambda: [given[1]], die]
collect_shards(build("roberta"), shards, sys.argv[1], ["query"], key={"data": 1})
"""


def test_killed_in_the_middle(tmp_path):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path / "b"], env=env, cwd=ROOT, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL
    kept = sorted(p.name for p in (tmp_path / "b").iterdir() if p.suffix == ".safetensors")
    assert kept == ["shard-00000.stats.safetensors", "shard-00001.stats.safetensors"]
    model, given = build("roberta"), batches("roberta", 2, examples=12)
    collected: list[int] = []

    def shard(i):
        collected.append(i)
        return [given[i]]

    shards = [lambda i=i: shard(i) for i in range(3)]
    resumed = collect_shards(model, shards, tmp_path / "b", ["query"], key={"data": 1})
    assert collected == [2]
    whole = collect_shards(model, shards, tmp_path / "a", ["query"], key={"data": 1})
    for site, moments in whole.sites.items():
        assert torch.equal(moments.second, resumed.sites[site].second)


def test_the_command_goes_on_after_an_interruption(tiny_base, tmp_path, monkeypatch, capsys):
    rows = write_rows(tmp_path / "one.csv", tiny_rows(2, 40))
    command = ["stats", "--base", tiny_base("bert").name, "--task", "one", "--train-file", str(rows), "--text", "text"]
    command += ["--target-modules", "query", "--samples", "20", "--json", "--device", "cpu"]

    def run(out: Path, code: int = 0):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--out", str(out)])
        assert ended.value.code == code
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(collecting, "SHARD_ROWS", 8)
    run(tmp_path / "whole")
    plain, calls = collecting.batches, []

    def stopped(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(collecting, "batches", stopped)
    run(tmp_path / "parted", 130)
    assert len(list(tmp_path.glob(".parted.*.parts/*.safetensors"))) == 2
    found = run(tmp_path / "parted")
    assert len(calls) == 4 and found["samples"] == 20  # only the third shard again
    assert not list(tmp_path.glob(".parted*"))
    a, b = (read_statistics(tmp_path / n) for n in ("whole", "parted"))
    assert all(torch.equal(m.second, b.sites[s].second) for s, m in a.sites.items())


def test_a_budget_at_the_prompt(tiny_base, tmp_path, capsys):
    rows = write_rows(tmp_path / "one.csv", tiny_rows(2, 40))
    command = ["stats", "--base", tiny_base("bert").name, "--task", "one", "--train-file", str(rows), "--text", "text"]
    command += ["--target-modules", "query", "--samples", "20", "--device", "cpu", "--out", str(tmp_path / "x")]
    for budget, code, said in (("1", 2, "do not hold the sums"), ("many", 2, "is not a size"), ("1GB", 0, "exact")):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--memory", budget])
        assert ended.value.code == code and said in capsys.readouterr().err
        assert not list(tmp_path.glob(".x*"))
    record = open_statistics(tmp_path / "x").provenance
    assert record["memory"]["chosen"] == "exact" and record["memory"]["allowed"] == 10**9
    assert len(record["tokenizer_sha256"]) == 64
