"""Weighted sums of LoRA files without torch: the numbers and the record are those of torch, and no file is whole in memory."""

from __future__ import annotations

import json
import os
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plait.adapters import file_bytes
from plait.adapters.sealed import read_sealed, sealed_texts
from plait.errors import InputError, RunError, UsageError
from plait.merging import MergeRequest, MergeSpec
from plait.merging.folders import read_all, spec_for, write_merge
from plait.merging.light import of_files as light_files
from plait.merging.light import of_folders as light
from plait.merging.light.of_files import sum_of_files
from plait.merging.planning import plan_merge
from tests.formats.conftest import KOHYA_NAMES, factors_of, kohya_tensors
from tests.merging.test_light import run

SPECS = {
    "sum": MergeSpec("task_arithmetic", scale=0.3),
    "twice": MergeSpec("cat", weights=[2.0, 0.5, 1.0]),
    "mean": MergeSpec("linear", weights=[1.0, -0.25, 2.0]),
    "one of them": MergeSpec("cat", weights=[0.0, 0.0, -1.5]),
    "none": MergeSpec("cat", weights=[0.0, 0.0, 0.0]),
    "unnamed": MergeSpec(),
}


def spelled(folder, seed, dtype, spelling):
    """A file in one of the spellings, its third module missing in the second file."""
    folder.mkdir(exist_ok=True)
    factors = factors_of(seed, dtype=dtype)
    if spelling == "kohya":
        tensors = kohya_tensors(factors)
    else:
        a, b = {"peft": ("lora_A", "lora_B"), "old": ("lora.down", "lora.up")}[spelling]
        tensors = {f"{m}.{half}.weight": t for m, (A, B, _) in factors.items() for half, t in ((a, A), (b, B))}
    if seed == 2:
        tensors = {k: t for k, t in tensors.items() if "proj_in" not in k}
    path = folder / f"s{seed}.safetensors"
    save_file(tensors, path, metadata={"ss_base_model_version": "sd_v1"})
    return str(path)


def by_torch(files, out, spec):
    adapters = read_all(files)
    return write_merge(plan_merge(adapters, spec_for(adapters, spec)), out)


def texts(path):
    """A file's texts, its record as JSON and without its digest, which tells of the others."""
    with safe_open(path, "pt") as f:
        found = {k: v for k, v in f.metadata().items() if k != "plait_sha256"}
    return {**found, "plait": json.loads(found["plait"])}


@pytest.mark.parametrize("spelling", ["kohya", "peft", "old"])
@pytest.mark.parametrize("kinds", ["float32", "float16", "bfloat16", "float32 bfloat16 float16"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_file_is_that_of_torch(tmp_path, spelling, kinds, spec):
    types = (kinds.split() * 3)[:3]
    files = [spelled(tmp_path / "in", i + 1, getattr(torch, t), spelling) for i, t in enumerate(types)]
    one, other = tmp_path / "one" / "m.safetensors", tmp_path / "other" / "m.safetensors"
    done, wanted = sum_of_files(MergeRequest(files, one, spec)), by_torch(files, other, spec)
    assert done is not None and done.record == wanted.record and done.record.verification_error == 0.0
    mine, theirs = load_file(one), load_file(other)
    assert mine.keys() == theirs.keys()
    assert all(mine[k].dtype == t.dtype and torch.equal(mine[k], t) for k, t in theirs.items())
    assert texts(one) == texts(other)
    assert read_sealed(one)[1] == sealed_texts(one)
    if len(set(types)) > 1 or "float32" in types:  # nothing is rounded, so the texts are known before the numbers are
        assert one.read_bytes() == other.read_bytes()
    assert done.seconds_merge >= done.seconds_verify > 0
    assert sum_of_files(MergeRequest(files, one, spec)).reused
    with pytest.raises(UsageError, match="exists with other settings"):
        sum_of_files(MergeRequest(files, one, MergeSpec("cat", scale=0.77)))


def test_the_command_runs_where_torch_cannot_be_imported(tmp_path):
    files = [spelled(tmp_path / "in", i, torch.float16, "kohya") for i in (1, 2)]
    out = tmp_path / "m.safetensors"
    command = ["merge", *files, "--method", "task_arithmetic", "--weights", "1,-0.5", "--out", out]
    code, said, errors = run(*command, "--json")
    assert code == 0, errors
    assert json.loads(said)["verification_error"] == 0.0 and not errors
    code, said, errors = run(*command)
    assert code == 0 and "was there already" in said, errors


def test_what_torch_alone_can_do_is_left_to_it(tmp_path):
    files = [spelled(tmp_path / "in", i, torch.float32, "kohya") for i in (1, 2)]
    out = tmp_path / "m.safetensors"
    eighth = tmp_path / "eighth.safetensors"
    save_file(
        {k: t if k.endswith("alpha") else t.to(torch.float8_e4m3fn) for k, t in load_file(files[0]).items()}, eighth
    )
    asked = {
        "a method": MergeRequest(files, out, MergeSpec("tsv")),
        "a rank": MergeRequest(files, out, MergeSpec("cat", rank=2)),
        "another format": MergeRequest(files, out, MergeSpec("cat"), format="peft"),
        "a folder": MergeRequest(files, tmp_path / "m", MergeSpec("cat")),
        "one as it is": MergeRequest(files[:1], out, MergeSpec("cat")),
        "one name twice": MergeRequest([files[0], files[0]], out, MergeSpec("cat")),
        "eight bits": MergeRequest([files[0], str(eighth)], out, MergeSpec("cat")),
    }
    for what, request in asked.items():
        assert sum_of_files(request) is None, what
    assert not out.exists() and not (tmp_path / "m").exists()


def test_memory_is_that_of_a_module(tmp_path, monkeypatch):
    """However many modules there are: inputs and result are pages of files, which nobody copies as a whole."""

    def refuse(size):
        raise AssertionError(f"{size} bytes for a whole file")

    monkeypatch.setattr(file_bytes, "own_block", refuse)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rank, width = 16, 4096
    size = 2 * 2 * rank * width * 4  # a module of the sum, in float32

    def peak(count):
        files = []
        for seed in (1, 2):
            g = torch.Generator().manual_seed(seed)
            tensors = {}
            for i in range(count):
                tensors[f"lora_unet_m{i}.lora_down.weight"] = torch.randn(rank, width, generator=g).half()
                tensors[f"lora_unet_m{i}.lora_up.weight"] = torch.randn(width, rank, generator=g).half()
                tensors[f"lora_unet_m{i}.alpha"] = torch.tensor(8.0).half()
            files.append(str(tmp_path / f"{count}-{seed}.safetensors"))
            save_file(tensors, files[-1])
        tracemalloc.start()
        try:
            assert sum_of_files(MergeRequest(files, tmp_path / f"{count}.safetensors", MergeSpec("linear"))) is not None
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(4), peak(40)
    assert few < 8 * size and many - few < size


def test_an_input_that_is_written_meanwhile_is_refused(tmp_path, monkeypatch):
    files = [spelled(tmp_path / "in", i, torch.float16, "kohya") for i in (1, 2)]
    right = light_files.sum_to

    def touching(*given):
        right(*given)
        os.utime(files[0], ns=(1, 1))

    monkeypatch.setattr(light_files, "sum_to", touching)
    with pytest.raises(InputError, match="changed while it was read"):
        sum_of_files(MergeRequest(files, tmp_path / "m.safetensors", MergeSpec("cat")))
    assert not (tmp_path / "m.safetensors").exists()


def test_a_wrong_sum_is_refused(tmp_path, monkeypatch):
    files = [spelled(tmp_path / "in", i, torch.float16, "kohya") for i in (1, 2)]
    right = light.rounded_sum
    monkeypatch.setattr(light, "rounded_sum", lambda parts, *rest: right([(c * 1.01, f) for c, f in parts], *rest))
    with pytest.raises(RunError, match=r"differs from the merge of its inputs by 0.01"):
        sum_of_files(MergeRequest(files, tmp_path / "m.safetensors", MergeSpec("cat")))
    assert not (tmp_path / "m.safetensors").exists()


def test_numbers_that_are_none_are_refused_by_name(tmp_path):
    file = spelled(tmp_path / "in", 1, torch.float16, "kohya")
    tensors = load_file(file)
    name = f"{next(iter(KOHYA_NAMES.values()))}.lora_up.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    request = MergeRequest([file], tmp_path / "m.safetensors", MergeSpec("cat", weights=[0.5]))
    with pytest.raises(InputError, match=f"tensor '{name}' holds NaN or infinity"):
        sum_of_files(request)
    save_file({k: t if k.endswith("alpha") else torch.full_like(t, 6e4) for k, t in load_file(file).items()}, file)
    with pytest.raises(RunError, match="the merge overflows float16"):
        sum_of_files(MergeRequest([file], tmp_path / "m.safetensors", MergeSpec("cat", weights=[9.0])))
    assert not (tmp_path / "m.safetensors").exists()
