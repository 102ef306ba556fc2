"""What a merge costs where it is served."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from plait.choosing import costs
from plait.errors import InputError
from tests.panels import random_adapter


def test_notes_of_a_server(tiny_base):
    adapter = random_adapter(tiny_base("llama"), "llama", "one", "causal", 1)
    assert "--max-lora-rank 8" in costs.vllm_notes([adapter])[0]
    wide = replace(
        adapter, modules={m: replace(f, A=f.A.repeat(10, 1), B=f.B.repeat(1, 10)) for m, f in adapter.modules.items()}
    )
    assert "32" in costs.vllm_notes([wide])[0]
    first = next(iter(adapter.modules))
    mixed = replace(adapter, modules={**adapter.modules, first: replace(adapter.modules[first], scaling=9.0)})
    assert any("read by vLLM 0.32, dropped in silence by older" in n for n in costs.vllm_notes([mixed]))


def test_a_base_without_weights_is_no_size(tmp_path):
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        costs.base_size(tmp_path / "x")
