"""Several ranks (gloo, on the CPU): the result does not depend on how many read the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plait.errors import UsageError
from plait.statistics import collect_statistics, read_statistics
from plait.statistics.distributed import own_share
from tests.conftest import tiny_rows, write_rows
from tests.statistics.models import batches, build
from tests.statistics.ranks import with_gradients
from tests.statistics.test_collect import relative_difference

ROOT = Path(__file__).parents[2]


def launch(folder: Path, kind: str, world: int) -> None:
    done = launched(folder, kind, world)
    assert done.returncode == 0, done.stderr[-3000:]


def launched(folder: Path, kind: str, world: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.run(
        [*command, "-m", "tests.statistics.ranks", str(folder), kind],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_world_sizes_agree(world, tmp_path):
    launch(tmp_path, "plain", world)
    given = batches("llama", 0, examples=24)
    alone = collect_statistics(build("llama"), given, ["q_proj", "v_proj", "down_proj"])
    found = read_statistics(tmp_path / f"plain-{world}")
    assert relative_difference(alone, found) < 1e-6
    curved = with_gradients(alone, given, 0, 1)
    assert found.provenance == curved.provenance
    for name, moments in curved.output_gradients.items():
        other = found.output_gradients[name]
        assert other.count == moments.count and other.padded_total is None
        torch.testing.assert_close(other.dense(), moments.dense(), rtol=1e-4, atol=1e-6 * moments.trace)
    for site, moments in alone.sites.items():
        torch.testing.assert_close(moments.total, found.sites[site].total, rtol=1e-5, atol=1e-5)
        assert moments.padded_count == found.sites[site].padded_count
    parted = read_statistics(tmp_path / f"grouped-{world}")
    assert parted.provenance["memory"]["chosen"] == "exact, 1 layer at a time"
    assert relative_difference(alone, parted) < 1e-6
    assert [parted.provenance[k] for k in ("samples", "tokens")] == [alone.provenance[k] for k in ("samples", "tokens")]
    for name, info in alone.modules.items():
        assert parted.modules[name].output_energy == pytest.approx(info.output_energy, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("uneven", 4), ("mean", 2), ("fsdp", 2), ("sketch", 2)])
def test_uneven_ranks_factors_and_sharded_weights(kind, world, tmp_path):
    """An empty rank, factors that are gathered, FSDP-wrapped weights, sketches within their bound."""
    launch(tmp_path, kind, world)
    given = batches("llama", 0, examples=24)[: 3 if kind == "uneven" else 6]
    options = {"pool": "mean"} if kind == "mean" else {}
    alone = collect_statistics(build("llama"), given, ["q_proj", "v_proj", "down_proj"], **options)
    found = read_statistics(tmp_path / f"{kind}-{world}")
    if kind != "sketch":
        assert relative_difference(alone, found) < 1e-6
        return
    for site, moments in alone.sites.items():
        lost = float(torch.linalg.matrix_norm(moments.dense() - found.sites[site].dense(), 2))
        assert 0 < lost <= found.sites[site].error


@pytest.mark.slow
def test_56_a_dead_rank_ends_the_others_and_leaves_nothing(tmp_path):
    assert launched(tmp_path, "dead", 2).returncode != 0
    assert list(tmp_path.iterdir()) == []
    launch(tmp_path, "uneven", 2)
    assert read_statistics(tmp_path / "uneven-2").sites


@pytest.mark.slow
def test_a_base_split_by_tensor_parallelism_is_refused_whatever_is_targeted(tmp_path):
    """q reads whole states there and only gives a part: its moments would be counted once a rank, its outputs once."""
    build("llama").save_pretrained(tmp_path / "base")
    launch(tmp_path, "tensors", 2)
    said = json.loads((tmp_path / "said.json").read_text())
    assert set(said) == {"q_proj", "down_proj", "all-linear"}
    assert all("sharded by tensor parallelism (load the base without tp_plan" in text for text in said.values())


def test_alone_everything_is_the_own_share():
    assert list(own_share(range(5))) == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="not initialised"):
        collect_statistics(build("llama"), batches("llama", 0), ["q_proj"], distributed=True)


# Read by every Python process that finds it first: at its end a rank notes how many (d, d) matrices it has added over all.
WATCH = """
import atexit, os, pathlib
if "RANK" in os.environ:
    import torch.distributed as dist
    added, reduce = [], dist.all_reduce
    def watched(tensor, *args, **options):
        added.append(tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1])
        return reduce(tensor, *args, **options)
    dist.all_reduce = watched
    name = f"rank-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}"
    atexit.register(lambda: pathlib.Path(__file__).with_name(name).write_text(str(sum(added))))
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_under_launchers(launcher, tiny_base, tmp_path):
    rows = write_rows(tmp_path / "one.csv", tiny_rows(2, 60))
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch/sitecustomize.py").write_text(WATCH)
    command = ["stats", "--base", tiny_base("bert").name, "--task", "one", "--train-file", str(rows), "--text", "text"]
    command += ["--target-modules", "query", "--samples", "40", "--device", "cpu", "--set", "statistics.batch_size=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path / 'watch'}:{ROOT / 'src'}"}
    for name, launch, extra in (
        ("alone", [], []),
        ("two", ["-m", *LAUNCHERS[launcher]], []),
        ("budget", ["-m", *LAUNCHERS[launcher]], ["--memory", "1GB"]),
    ):
        done = subprocess.run(
            [sys.executable, *launch, "-m", "plait", *command, *extra, "--out", tmp_path / name, "--json"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["samples"] == 40  # one process speaks, of the rows of both
        found = read_statistics(tmp_path / name)
        assert relative_difference(read_statistics(tmp_path / "alone"), found) < 1e-6
        noted = {p.name: int(p.read_text()) for p in (tmp_path / "watch").glob("rank-*")}
        wanted = {f"rank-{r}-of-2": len(found.sites) for r in (0, 1)} if launch else {}
        assert noted == wanted  # both were there, and one all-reduce a site added the moments
    assert found.provenance["memory"]["chosen"] == "exact"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "budget", "one.csv", "two", "watch"]
