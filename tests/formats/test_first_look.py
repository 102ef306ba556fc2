"""The first look at an adapter: large folders by their headers alone, small ones whole, and neither with torch."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import WEIGHTS, write_adapter
from plait.disk import store
from plait.errors import Damaged
from plait.formats import first_look
from plait.formats.first_look import attempt, squares_of
from plait.formats.inspect import inspect
from plait.formats.inspect_words import inspection_text
from plait.formats.reading import read_any
from tests.merging.test_light import kinds, run, saved

KINDS = ["plain", "half", "bfloat16", "mixed", "heads", "kernels", "embeddings", "whole"]


def experts(folder):
    g = torch.Generator().manual_seed(3)
    modules = {
        f"layers.0.experts.{name}[{e}]": LoraFactors(
            torch.randn(2, width, generator=g), torch.randn(out, 2, generator=g), 2.0, "expert"
        )
        for name, out, width in (("gate_up_proj", 24, 16), ("down_proj", 16, 12))
        for e in range(3)
    }
    folder.mkdir()
    write_adapter(folder, Adapter(folder.name, "base", modules))
    return folder


def adapter_of_kind(tmp_path, what):
    return experts(tmp_path / "a") if what == "experts" else kinds(tmp_path, what)[0]


@pytest.mark.parametrize("what", [*KINDS, "experts"])
def test_a_large_folder_tells_the_same_by_its_headers(tmp_path, monkeypatch, what):
    folder = adapter_of_kind(tmp_path, what)
    small = inspect(folder)
    assert small.facts.problem is None and small.facts.figures.update_norm > 0
    monkeypatch.setattr(first_look, "READ_WHOLE", 0)
    unread = replace(small.facts.figures, update_norm=None, zero_modules=None)
    assert inspect(folder) == replace(small, facts=replace(small.facts, figures=unread))
    assert inspect(folder, full=True) == small


@pytest.mark.parametrize("what", [*KINDS, "experts"])
def test_lengths_are_those_that_torch_forms(tmp_path, what):
    folder = adapter_of_kind(tmp_path, what)
    by_torch = [f.norm_squared() for f in read_any(folder).modules.values()]
    adapter, _ = attempt(folder, 1, full=False)
    np.testing.assert_allclose(squares_of(adapter), by_torch, rtol=1e-12)


def test_types_that_numpy_lacks(tmp_path, monkeypatch):
    folder = saved(tmp_path / "a", 0)
    weights = {k: t.to(torch.float8_e4m3fn) for k, t in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    small = inspect(folder)
    assert small.facts.dtypes == ("float8_e4m3fn",) and small.facts.figures.update_norm > 0
    monkeypatch.setattr(first_look, "READ_WHOLE", 0)
    assert inspect(folder).facts.figures.ranks == small.facts.figures.ranks
    assert inspect(folder, full=True) == small
    save_file({k: t.float().int() for k, t in weights.items()}, folder / WEIGHTS)
    assert "torch.int32 (4, 36), expected a floating matrix" in inspect(folder).facts.problem


def test_what_is_not_read_is_not_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(first_look, "READ_WHOLE", 0)
    folder = saved(tmp_path / "a", 0)
    weights = load_file(folder / WEIGHTS)
    key = next(k for k in weights if "lora_B" in k)
    weights[key][1, 1] = float("nan")
    save_file(weights, folder / WEIGHTS)
    assert inspect(folder).facts.problem is None
    assert "|update|   not read" in inspection_text(inspect(folder))
    assert inspect(folder, full=True).facts.problem == f"tensor {key!r} holds NaN or infinity"


def test_damage_that_sizes_show_is_told_of_large_folders_too(tmp_path, monkeypatch):
    monkeypatch.setattr(first_look, "READ_WHOLE", 0)
    folder = tmp_path / "a"
    with store.staged_folder(folder, store.identity("merge", {}, {})) as stage:
        write_adapter(stage, read_any(saved(tmp_path / "b", 0)))
    assert inspect(folder).facts.problem is None and inspect(folder, full=True).facts.problem is None
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert inspect(folder).facts.problem is None
    with pytest.raises(Damaged, match="is not what was written"):
        inspect(folder, full=True)
    (folder / WEIGHTS).write_bytes(whole)
    config = json.loads((folder / "adapter_config.json").read_text())
    text = (
        (folder / "adapter_config.json").read_text().replace(f'"lora_alpha": {config["lora_alpha"]}', '"lora_alpha": 9')
    )
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(Damaged, match="adapter_config"):
        inspect(folder)


@pytest.mark.parametrize("what", ["plain", "bfloat16", "heads", "kernels"])
def test_the_command_runs_where_torch_cannot_be_imported(tmp_path, what):
    folder = kinds(tmp_path, what)[0]
    code, said, errors = run("inspect", folder, "--json")
    assert code == 0 and not errors, errors
    found = json.loads(said)
    assert found["update_norm"] == pytest.approx(inspect(folder).facts.figures.update_norm)
    code, said, errors = run("inspect", folder)
    assert code == 0 and f"|update|   {found['update_norm']:.4g}\n" in said, errors
