"""A merge that was chosen and is chosen again keeps the type that its factors were asked for in."""

from __future__ import annotations

import pytest
import torch

from plait.adapters.tensors import read_tensors
from plait.choosing.auto_folders import merge_auto_folders
from plait.choosing.rechoosing import choose_again
from plait.merging.changes import Change, recorded_choice
from tests.panels import folders_of


@pytest.mark.parametrize("asked", ["bfloat16", "float32"])
def test_an_edit_keeps_the_type(make_panel, tmp_path, asked):
    folders = folders_of(make_panel(), tmp_path)
    merge_auto_folders(folders, tmp_path / "chosen", dtype=asked)
    recipe = recorded_choice(tmp_path / "chosen")
    choose_again(recipe, Change([], ["one"], {}, {}, None, {}), tmp_path / "edited")
    for folder in ("chosen", "edited"):
        tensors = read_tensors(tmp_path / folder / "adapter_model.safetensors")[0]
        assert {t.dtype for k, t in tensors.items() if "lora_" in k} == {getattr(torch, asked)}
