"""Single files and the digest that they carry: a changed byte is noticed or changes nothing, and files of others are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.sealed import SEAL, SEALED, digest_of, read_sealed
from plait.adapters.tensors import read_metadata
from plait.disk.store import identity
from plait.errors import Damaged, PlaitError, UsageError
from plait.formats.single_file import read_lora_file
from plait.formats.writing import finished, write_any
from plait.statistics.files import read_identity, read_statistics, write_statistics
from plait.statistics.fisher import FisherDiagonal, read_fisher, write_fisher
from plait.statistics.moments import ModuleInfo, Statistics
from tests.command import call
from tests.statistics.test_moments import moments_of

WANTED = identity("merge", {"method": "linear"}, {"adapter:a": "0" * 64}, 0)
DAMAGES = (SEAL, SEALED)


def an_adapter() -> Adapter:
    made = torch.Generator().manual_seed(0)
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = LoraFactors(torch.randn(2, 8, generator=made), torch.randn(8, 2, generator=made), 1.0)
    return Adapter("style", "org/base", {module: factors}, source={"format": "diffusers", "layouts": {}})


def kohya(path: Path) -> Path:
    adapter = an_adapter()
    named = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": next(iter(adapter.modules.values()))
    }
    write_any(path, Adapter("style", "sd_v1", named, source={"format": "kohya"}), "kohya", WANTED, {"tasks": ["a"]})
    return path


def diffusers(path: Path) -> Path:
    write_any(path, an_adapter(), "diffusers", WANTED, {"tasks": ["a", "b"]})
    return path


def fisher(path: Path) -> Path:
    write_fisher(path, FisherDiagonal.held({"l.q": torch.rand(5, 6)}, 7, task="a"))
    return path


def statistics(path: Path) -> Path:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    found = Statistics({"s": moments_of(rows)}, {"l.q": ModuleInfo("s", (4, 6), 2.5)}, {"base": "b"})
    write_statistics(path, found, identity=WANTED)
    return path


def lora(path: Path) -> object:
    found = read_lora_file(path)
    modules = {m: (f.A.numpy().tobytes(), f.B.numpy().tobytes(), f.scaling, f.kind) for m, f in found.modules.items()}
    return modules, found.base, found.name, finished(path, WANTED, overwrite=False)


def diagonal(path: Path) -> object:
    found = read_fisher(path)
    return {m: d.rows(0, 5).numpy().tobytes() for m, d in found.modules.items()}, found.examples, dict(found.provenance)


def moments(path: Path) -> object:
    found = read_statistics(path)
    sites = {
        s: (m.count, m.total.numpy().tobytes(), m.second.numpy().tobytes(), m.error) for s, m in found.sites.items()
    }
    return sites, dict(found.modules), dict(found.provenance), read_identity(path)


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "kohya": (kohya, lora),
    "diffusers": (diffusers, lora),
    "fisher": (fisher, diagonal),
    "statistics": (statistics, moments),
}


def misread(path: Path, read: Callable[[Path], object], flips: list[tuple[int, int]]) -> tuple[int, list[str]]:
    """Change one bit at a time; how many were noticed, and those that are read with another meaning."""
    whole, meant = path.read_bytes(), read(path)
    noticed, fell = 0, []
    for place, bit in flips:
        data = bytearray(whole)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        try:
            if read(path) != meant:
                fell.append(f"bit {bit} of byte {place}")
        except PlaitError as e:
            noticed += 1
            assert e.exit_code in (2, 3), e
    path.write_bytes(whole)
    return noticed, fell


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_of_every_byte(tmp_path, kind):
    write, read = KINDS[kind]
    path = write(tmp_path / f"{kind}.safetensors")
    drawn = np.random.default_rng(0)
    flips = [(place, int(drawn.integers(8))) for place in range(path.stat().st_size)]
    noticed, fell = misread(path, read, flips)
    assert not fell and noticed > 0.9 * len(flips)


@pytest.mark.parametrize("kind", ["kohya", "diffusers", "fisher"])
def test_files_without_a_digest_are_read_and_changed_ones_named(tmp_path, kind):
    write, read = KINDS[kind]
    path = write(tmp_path / f"{kind}.safetensors")
    tensors, metadata = load_file(path), read_metadata(path)
    assert metadata[SEAL] == digest_of(tensors, {k: v for k, v in metadata.items() if k != SEAL})
    bare = {k: v for k, v in metadata.items() if k not in (SEAL, SEALED)}
    other = {k: v + 1 for k, v in tensors.items()}
    save_file(other, path, bare)
    assert read(path)  # of others, or of a version before
    for broken in (metadata, {**bare, SEAL: metadata[SEAL]}, {**bare, SEALED: metadata[SEALED]}):
        save_file(other, path, broken)
        with pytest.raises(Damaged, match="not the file that was written"):
            read(path)


def test_names_types_and_shapes_are_in_the_digest():
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(0)}
    texts = {"k": "v"}
    others = [
        ({"a": torch.zeros(3, 2), "b": torch.zeros(0)}, texts),
        ({"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.zeros(0)}, texts),
        ({"c": torch.zeros(2, 3), "b": torch.zeros(0)}, texts),
        ({"a": torch.zeros(2, 3)}, texts),
        (tensors, {"k": "w"}),
        (tensors, {"kv": ""}),
        (tensors, {}),
    ]
    assert len({digest_of(tensors, texts), *(digest_of(*o) for o in others)}) == 1 + len(others)
    assert digest_of({"b": tensors["b"], "a": torch.zeros(3, 2).T * 0}, texts) == digest_of(tensors, texts)


def test_a_damaged_file_is_not_there_already(tmp_path):
    path = diffusers(tmp_path / "style.safetensors")
    assert finished(path, WANTED, overwrite=False)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged):
        finished(path, WANTED, overwrite=False)
    assert finished(path, WANTED, overwrite=True) is None
    with pytest.raises(UsageError):
        finished(diffusers(tmp_path / "b.safetensors"), identity("merge", {}, {}, 1), overwrite=False)


@pytest.mark.parametrize("kind", KINDS)
def test_check_reads_a_single_file(capsys, tmp_path, kind):
    write, _ = KINDS[kind]
    path = write(tmp_path / f"{kind}.safetensors")
    code, out, err = call(capsys, "check", path)
    assert code == 0 and not err and "every byte is what was written" in out
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    code, out, err = call(capsys, "check", path)
    assert code == 3 and path.name in err and "changed since it was written" in out
    if kind in ("fisher", "statistics"):
        code, _, err = call(capsys, "check", path, "--for", "peft")
        assert code in (2, 3)


def test_check_says_where_there_is_no_digest(capsys, tmp_path):
    path = kohya(tmp_path / "style.safetensors")
    save_file(load_file(path), path, {"ss_network_module": "networks.lora"})
    code, out, _ = call(capsys, "check", path)
    assert code == 0 and "no digest of plait's" in out
    assert read_sealed(path)[1] == {"ss_network_module": "networks.lora"}


def test_statistics_that_cannot_be_are_found_by_check(capsys, tmp_path):
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "a.stats.safetensors"
    write_statistics(path, Statistics({"s": moments_of(rows)}, {"l.q": ModuleInfo("s", (4, 5), 2.5)}, {}))
    code, out, err = call(capsys, "check", path)
    assert code == 3 and "width 5" in err + out


def test_check_claims_nothing_of_statistics_without_a_digest(capsys, tmp_path):
    path = KINDS["fisher"][0](tmp_path / "a.fisher.safetensors")
    metadata = {k: v for k, v in read_metadata(path).items() if not k.startswith("plait_")}
    save_file(load_file(path), path, metadata)
    code, out, _ = call(capsys, "check", path)
    assert code == 0 and "no digest of plait's" in out and "every byte" not in out
