"""Files filled tensor by tensor: the same bytes as those written whole, and no hole in them."""

from __future__ import annotations

import gc
import hashlib
import json
import mmap
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from plait.adapters import file_bytes, hashing, tensor_file
from plait.adapters.file_bytes import begin_arrays
from plait.adapters.hashing import Hashing
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.memory import again_like, bytes_of, give_back, let_go, own_copy, own_memory
from plait.adapters.peft_format import WEIGHTS, write_adapter
from plait.adapters.shapes import begin_shapes
from plait.adapters.tensor_file import fill_tensors, write_tensors
from plait.adapters.tensors import begin_tensors, read_tensors
from plait.errors import InputError

TENSORS = {
    "b": torch.arange(12.0).view(3, 4),
    "a": torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c": torch.zeros(0, 4),
    "d": torch.tensor([1, 2], dtype=torch.int64),
}


def shapes(tensors):
    return {k: torch.empty_like(v, device="meta") for k, v in tensors.items()}


@pytest.mark.parametrize("order", [list("abcd"), list("dcba")])
def test_order_and_threads_do_not_show_in_the_bytes(tmp_path, order):
    write_tensors(tmp_path / "whole", TENSORS, {"k": "v"})

    def fill(put):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda k: put(k, TENSORS[k]), order))

    fill_tensors(tmp_path / "filled", shapes(TENSORS), {"k": "v"}, fill)
    assert (tmp_path / "filled").read_bytes() == (tmp_path / "whole").read_bytes()
    assert all(torch.equal(v, TENSORS[k]) for k, v in read_tensors(tmp_path / "filled")[0].items())


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda put: [put(k, TENSORS[k]) for k in "abc"], "d was never written"),
        (lambda put: put("b", TENSORS["b"].T), "not what its header says"),
        (lambda put: put("b", TENSORS["b"].double()), "not what its header says"),
    ],
)
def test_what_differs_from_the_header_is_refused(tmp_path, fill, message):
    with pytest.raises(ValueError, match=message):
        fill_tensors(tmp_path / "x", shapes(TENSORS), None, fill)


def test_without_the_systems_hint_the_bytes_are_the_same(tmp_path, monkeypatch):
    write_tensors(tmp_path / "hinted", TENSORS)
    monkeypatch.setattr(tensor_file, "_sync_file_range", None)
    write_tensors(tmp_path / "plain", TENSORS)
    assert (tmp_path / "hinted").read_bytes() == (tmp_path / "plain").read_bytes()


def test_the_disk_begins_at_every_stride(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(tensor_file, "_sync_file_range", lambda *range_and_flags: begun.append(range_and_flags[1:3]))
    monkeypatch.setattr(tensor_file, "_STRIDE", 4096)
    write_tensors(tmp_path / "x", {f"{i:02}": torch.zeros(256) for i in range(16)})  # a kilobyte each
    assert 4 <= len(begun) <= 6 and set(begun) == {(0, 0)}  # up to the end of the file


def test_an_adapter_filled_is_the_adapter_written(tmp_path):
    g = torch.Generator().manual_seed(1)
    kinds = {"layers.0.q": "linear", "layers.1.q": "linear", "embed": "embedding"}
    modules = {
        m: LoraFactors(torch.randn(3, 8, generator=g), torch.randn(6, 3, generator=g), 1.0, k) for m, k in kinds.items()
    }
    head = {"t": {"classifier.weight": torch.ones(2, 6)}}
    whole = Adapter("t", "base", modules, "SEQ_CLS", "bert", head, target_modules=("embed", "q"))
    shell = {m: LoraFactors(f.A.to("meta"), f.B.to("meta"), 1.0, f.kind) for m, f in modules.items()}
    empty = Adapter("t", "base", shell, "SEQ_CLS", "bert", head, target_modules=("embed", "q"))
    for name in ("whole", "filled"):
        (tmp_path / name).mkdir()
    write_adapter(tmp_path / "whole", whole)
    write_adapter(tmp_path / "filled", empty, lambda put: [put(m, f) for m, f in reversed(modules.items())])
    for file in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "filled" / file).read_bytes()


def test_memory_of_its_own_has_the_size_asked_for():
    for size in (0, 1, 4096, (1 << 20) + 1, (3 << 20) + 7):
        block = own_memory(size)
        assert block.numel() == size and not block.any()
    wanted = torch.randn(7, 3).double()
    copy = own_copy(wanted)
    assert torch.equal(copy, wanted) and copy.data_ptr() != wanted.data_ptr()


def test_the_hash_of_what_was_read_is_the_files_whatever_the_pieces(tmp_path, monkeypatch):
    write_tensors(tmp_path / "x", TENSORS)
    wanted = hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    for piece in (1, 7, 16, 1 << 20):
        monkeypatch.setattr(file_bytes, "PIECE", piece)
        found, _, digest = read_tensors(tmp_path / "x")
        assert digest == wanted and all(torch.equal(v, TENSORS[k]) for k, v in found.items())


@pytest.mark.parametrize("order", [1, -1, 5])
def test_the_hash_of_what_was_written_is_the_files_in_whatever_order(tmp_path, monkeypatch, order):
    monkeypatch.setattr(hashing, "RANGE", mmap.ALLOCATIONGRANULARITY)
    many = {f"{i:02}": torch.full((700,), float(i)) for i in range(24)} | {"none": torch.zeros(0, 3)}
    names = list(many)[::order] if order < 2 else [n for k in range(order) for n in list(many)[k::order]]
    with Hashing() as beside:
        written = beside.file(tmp_path / "x")
        fill_tensors(tmp_path / "x", shapes(many), None, lambda put: [put(n, many[n]) for n in names], written)
        digest = written.whole()
        assert digest() == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


def test_what_lies_behind_a_gap_waits_and_what_is_whole_is_hashed_at_once(tmp_path, monkeypatch):
    size = mmap.ALLOCATIONGRANULARITY
    monkeypatch.setattr(hashing, "RANGE", size)
    content = bytes(range(256)) * (size // 128) + b"rest"
    (tmp_path / "x").write_bytes(content)
    with Hashing() as beside:
        pieces = beside.pieces()
        written = hashing.WrittenFile(tmp_path / "x", pieces)
        for start, stop, hashed in ((size, 2 * size, 0), (0, size, 2 * size), (2 * size, len(content), 2 * size)):
            written.wrote(start, stop)
            assert pieces.digest() == hashlib.sha256(content[:hashed]).hexdigest()
        assert written.whole()() == hashlib.sha256(content).hexdigest()


def test_a_hash_that_was_not_finished_is_an_error(tmp_path, monkeypatch):
    write_tensors(tmp_path / "x", TENSORS)

    class Failing:
        def update(self, piece):
            raise MemoryError("no more")

    monkeypatch.setattr(hashing.hashlib, "sha256", Failing)
    with pytest.raises(MemoryError):
        read_tensors(tmp_path / "x")


def test_reading_that_fails_leaves_no_thread(tmp_path):
    (tmp_path / "x").write_bytes(struct.pack("<Q", 2) + b"{}" + bytes(9))  # bytes that belong to no tensor
    before = threading.active_count()
    with pytest.raises(InputError):
        read_tensors(tmp_path / "x")
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(5)
    assert threading.active_count() <= before


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_numbers_that_a_file_does_not_align_are_still_there_when_they_are_read_later(tmp_path, shift, kind):
    """What is mapped is let go of once it is found finite; a copy of what lies askew has no file to come back from."""
    held = np.arange(1, 1 + 512 * 512, dtype={"F32": "<f4", "F16": "<u2"}[kind]) % 1000
    entry = {"x": {"dtype": kind, "shape": [512, 512], "data_offsets": [0, held.nbytes]}}
    head = json.dumps(entry).encode()
    head += b" " * (-len(head) % 8 + shift)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + held.tobytes())
    arrays, _, _ = begin_arrays(path, None, finite=True)
    tensors, _, _ = begin_tensors(path, None, finite=True)
    let_go(arrays["x"])
    assert bytes_of(arrays["x"]).tobytes() == held.tobytes() == bytes_of(tensors["x"]).tobytes()
    for reader in (None, Hashing()):  # an infinity is found all the same
        spoilt = np.array([np.inf], held.dtype if kind == "F32" else "<f2").tobytes()
        path.write_bytes(path.read_bytes()[: -len(spoilt)] + spoilt)
        with pytest.raises(InputError, match="NaN or infinity"):
            begin_tensors(path, reader, finite=True)


def test_pages_are_given_back_each_time_32_mib_of_them_were_used(monkeypatch):
    mapped, given_back, counts = file_bytes.Mapped(), [], []
    monkeypatch.setattr(mapped, "let_go", lambda: given_back.append(len(counts)))
    for _ in range(9):
        mapped.passed(1 << 24)
        counts.append(len(given_back))
    assert counts == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    mapped.passed((1 << 25) + 1)
    assert len(given_back) == 4


def test_a_header_alone_is_checked_too(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2, 3)}, {})
    seen = []
    shapes, _, digest = begin_shapes(tmp_path / "x.safetensors", None, check=seen.append)
    assert seen == [{"a": (2, 3)}] and shapes["a"].shape == (2, 3) and digest() == ""


@pytest.mark.parametrize("answer", [None, lambda fd, mode, start, size: -1], ids=["no such call", "refused"])
def test_a_disk_that_sets_no_place_aside_gets_the_same_bytes(answer, tmp_path, monkeypatch):
    tensors = {"a": torch.arange(1 << 21, dtype=torch.float32), "b": torch.ones(3)}
    write_tensors(tmp_path / "aside", tensors)
    monkeypatch.setattr(tensor_file, "_fallocate", answer)
    write_tensors(tmp_path / "plain", tensors)
    assert (tmp_path / "aside").read_bytes() == (tmp_path / "plain").read_bytes()


def test_memory_is_used_again_once_nobody_holds_it():
    like = torch.empty(0)
    first = again_like("here", like, (30, 70)).fill_(1.0)
    part, place = first[3:], first.data_ptr()
    del first
    other = again_like("here", like, (30, 70)).fill_(2.0)
    assert other.data_ptr() != place and bool((part == 1).all())
    place = other.data_ptr()
    del other
    assert again_like("here", like, (3, 7)).data_ptr() == place
    assert again_like("there", like, (3, 7)).data_ptr() != place
    assert again_like("here", like.double(), (0, 7)).shape == (0, 7)
    give_back()
    assert bool((part == 1).all())
