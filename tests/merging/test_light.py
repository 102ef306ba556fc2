"""Weighted sums without torch: the bytes are those of merging by torch, and torch is nowhere imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plait.adapters import file_bytes
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.disk.store import sha256_file
from plait.errors import InputError, RunError
from plait.merging import MergeRequest, MergeSpec, answer
from plait.merging.light import of_folders as light
from plait.merging.light.of_folders import sum_of_folders
from plait.merging.ways import answer_by_torch

# What takes longer to import than a small merge takes.
HEAVY = ("torch", "pydantic", "yaml", "rich", "safetensors.torch", "jaxtyping")
REFUSING = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            raise ImportError("this was to run without " + name)
sys.meta_path.insert(0, Refuse())
from plait.entry import main
sys.argv[0] = "plait"
main()
"""


def run(*arguments, but=(), also=(), **environment):
    """A command in a process without torch and its like, `but` those, nor what is in `also`; its exit code, and what it wrote."""
    refused = (*(name for name in HEAVY if name not in but), *also)
    script = REFUSING.replace(repr(HEAVY), repr(refused))
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def saved(folder, seed, dtype=torch.float32, *, rank=4, scaling=2.0, modules=("q", "v"), kind="linear", **kept):
    g = torch.Generator().manual_seed(seed)
    made = {
        f"layers.{i}.{t}": LoraFactors(
            torch.randn(rank, 36, generator=g).to(dtype), torch.randn(24, rank, generator=g).to(dtype), scaling, kind
        )
        for i in range(2)
        for t in modules
    }
    folder.mkdir(parents=True)
    write_adapter(folder, Adapter(folder.name, "base", made, target_modules=tuple(modules), **kept))
    return folder


def head(seed):
    g = torch.Generator().manual_seed(seed)
    return {"classifier.weight": torch.randn(3, 24, generator=g), "classifier.bias": torch.randn(3, generator=g)}


def kinds(folder, what):
    """Adapters of every kind that sums meet."""
    if what == "half":
        return [saved(folder / n, i, torch.float16) for i, n in enumerate("abc")]
    if what == "bfloat16":
        return [saved(folder / n, i, torch.bfloat16) for i, n in enumerate("abc")]
    if what == "mixed":
        types = (torch.float32, torch.bfloat16, torch.float64)
        return [saved(folder / n, i, t, rank=2 + i) for i, (n, t) in enumerate(zip("abc", types, strict=True))]
    if what == "heads":
        return [
            saved(folder / n, i, task_type="SEQ_CLS", prefix="bert", heads={n: head(i)}) for i, n in enumerate("abc")
        ]
    if what == "kernels":
        return [saved(folder / n, i, kind="conv:3x3") for i, n in enumerate("abc")]
    if what == "embeddings":
        return [saved(folder / n, i, kind="embedding", modules=("embed_tokens",)) for i, n in enumerate("abc")]
    if what == "missing":
        return [saved(folder / "a", 0), saved(folder / "b", 1, modules=("q",)), saved(folder / "c", 2, scaling=1 / 3)]
    if what == "whole":
        extra = {"extras": {"lm_head.weight": torch.ones(5, 24)}, "modules_to_save": ("lm_head",)}
        return [saved(folder / "a", 0, **extra), saved(folder / "b", 1), saved(folder / "c", 2)]
    return [saved(folder / n, i) for i, n in enumerate("abc")]


def contents(folder):
    """Hash of every file, and of the manifest what does not tell time."""
    files = {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}
    files.pop("plait.json")
    return files, (folder / "plait.json").read_text()


SPECS = {
    "sum": MergeSpec("task_arithmetic", scale=0.3),
    "by rule": MergeSpec("task_arithmetic"),
    "mean": MergeSpec("linear", weights=[1.0, -0.25, 2.0]),
    "cat": MergeSpec("cat", weights=[1.0, 0.0, -1.5]),
    "nothing": MergeSpec("cat", weights=[0.0, 0.0, 0.0]),
    "by weights": MergeSpec(weights=[0.5, 0.5, 1.0]),
}


@pytest.mark.parametrize("what", ["plain", "half", "bfloat16", "mixed", "heads", "kernels", "embeddings", "missing"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_bytes_are_those_of_torch(tmp_path, what, spec):
    folders = [str(f) for f in kinds(tmp_path, what)]
    one = sum_of_folders(MergeRequest(folders, tmp_path / "one" / "out", spec))
    other = answer_by_torch(MergeRequest(folders, tmp_path / "other" / "out", spec))
    assert one is not None and contents(tmp_path / "one" / "out") == contents(tmp_path / "other" / "out")
    assert one.record == other.record and one.record.verification_error < 1e-5
    assert one.seconds_merge >= one.seconds_verify > 0
    assert answer(MergeRequest(folders, tmp_path / "other" / "out", spec)).reused


@pytest.mark.parametrize("what", ["plain", "bfloat16", "half", "heads"])
def test_the_command_runs_where_torch_cannot_be_imported(tmp_path, what):
    folders = kinds(tmp_path, what)
    command = ["merge", *folders, "--method", "task_arithmetic", "--weights", "1,-0.5,0.3"]
    code, said, errors = run(*command, "--out", tmp_path / "one" / "out", "--json")
    assert code == 0, errors
    assert json.loads(said)["seconds_merge"] > 0 and not errors
    spec = MergeSpec("task_arithmetic", weights=[1.0, -0.5, 0.3])
    answer_by_torch(MergeRequest([str(f) for f in folders], tmp_path / "other" / "out", spec))
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "other" / "out")
    code, said, errors = run(*command, "--out", tmp_path / "one" / "out")
    assert code == 0 and "was there already" in said, errors


def test_what_torch_alone_can_do_is_left_to_it(tmp_path):
    a, b = saved(tmp_path / "a", 0), saved(tmp_path / "b", 1)
    pair = [str(a), str(b)]
    asked = {
        "a method": MergeRequest(pair, tmp_path / "o", MergeSpec("tsv")),
        "a rank": MergeRequest(pair, tmp_path / "o", MergeSpec("cat", rank=2)),
        "a calibration": MergeRequest(pair, tmp_path / "o", MergeSpec("cat", calibrate="pico")),
        "another format": MergeRequest(pair, tmp_path / "o", MergeSpec("cat"), format="mlx"),
        "one as it is": MergeRequest(pair[:1], tmp_path / "o", MergeSpec("cat")),
        "weights by module": MergeRequest(pair, tmp_path / "o", MergeSpec("cat", module_weights={"a": {"default": 2}})),
        "the default": MergeRequest(pair, tmp_path / "o"),
    }
    for what, request in asked.items():
        assert sum_of_folders(request) is None, what
    eighths = {m: LoraFactors(f.A.to(torch.float8_e4m3fn), f.B, 1.0) for m, f in read_adapter(a).modules.items()}
    (tmp_path / "c").mkdir()
    write_adapter(tmp_path / "c", Adapter("c", "base", eighths, target_modules=("q", "v")))
    assert sum_of_folders(MergeRequest([*pair, str(tmp_path / "c")], tmp_path / "o", MergeSpec("cat"))) is None
    assert not (tmp_path / "o").exists()


def test_errors_are_those_of_torch_and_leave_nothing(tmp_path):
    a, b = saved(tmp_path / "a", 0), saved(tmp_path / "b", 1)
    tensors = read_adapter(b)
    bad = {m: LoraFactors(f.A, f.B, f.scaling) for m, f in tensors.modules.items()}
    bad["layers.0.q"].B[2, 1] = float("nan")
    from safetensors.torch import load_file, save_file

    weights = load_file(b / "adapter_model.safetensors")
    key = next(k for k in weights if "lora_B" in k)
    weights[key][1, 1] = float("inf")
    (b / "plait.json").unlink(missing_ok=True)
    save_file(weights, b / "adapter_model.safetensors")
    request = MergeRequest([str(a), str(b)], tmp_path / "out", MergeSpec("cat"))
    for way in (sum_of_folders, answer_by_torch):
        with pytest.raises(InputError, match=f"tensor '{key}' holds NaN or infinity"):
            way(request)
    huge = load_file(a / "adapter_model.safetensors")
    save_file({k: t * 1e30 if "lora_B" in k else t for k, t in huge.items()}, a / "adapter_model.safetensors")
    (a / "plait.json").unlink(missing_ok=True)
    whole = MergeRequest([str(a)], tmp_path / "out", MergeSpec("cat", weights=[1e11]))
    for way in (sum_of_folders, answer_by_torch):
        with pytest.raises(RunError, match="cat gave NaN or infinity"):
            way(whole)
    assert not (tmp_path / "out").exists()


def test_a_wrong_sum_is_refused(tmp_path, monkeypatch):
    pair = [str(saved(tmp_path / "a", 0)), str(saved(tmp_path / "b", 1))]
    right = light.stored_sum
    monkeypatch.setattr(light, "stored_sum", lambda parts, dtype: right([(c * 1.01, f) for c, f in parts], dtype))
    with pytest.raises(RunError, match=r"differs from the merge of its inputs by 0.01"):
        sum_of_folders(MergeRequest(pair, tmp_path / "out", MergeSpec("cat")))
    assert not (tmp_path / "out").exists()


def test_what_the_room_offers_is_no_file_of_the_room():
    import plait.merging as room

    files = {p.stem for p in Path(room.__file__).parent.glob("*.py")}
    assert not files & {*room.__all__}, "importing the file would hide the name behind it"
    assert all(getattr(room, name) is not None for name in room.__all__)


@pytest.mark.parametrize("what", ["plain", "bfloat16", "mixed", "heads", "missing"])
def test_large_folders_are_added_up_on_their_own_pages(tmp_path, monkeypatch, what):
    """By two threads, the same bytes, and nothing of the factors is copied into memory; a file written meanwhile is refused."""
    folders = [str(f) for f in kinds(tmp_path, what)]
    other = answer_by_torch(MergeRequest(folders, tmp_path / "other" / "out", SPECS["mean"]))

    allocate = file_bytes.own_block

    def refuse(size):
        assert size < 1000, "more than a head"
        return allocate(size)

    monkeypatch.setattr(file_bytes, "own_block", refuse)
    monkeypatch.setattr(light, "_LARGE", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    one = sum_of_folders(MergeRequest(folders, tmp_path / "one" / "out", SPECS["mean"]))
    assert one is not None and one.record == other.record
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "other" / "out")
    right = light.sum_to

    def touching(*given):
        right(*given)
        os.utime(Path(folders[0]) / "adapter_model.safetensors", ns=(1, 1))

    monkeypatch.setattr(light, "sum_to", touching)
    with pytest.raises(InputError, match="changed while it was read"):
        sum_of_folders(MergeRequest(folders, tmp_path / "two", SPECS["mean"]))
    assert not (tmp_path / "two").exists()
