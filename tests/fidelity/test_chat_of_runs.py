"""Adapters that `plait run` trained with the chat template are asked with it: their records hold the rows of all tasks by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plait.adapters.lineage import trained_rows
from plait.disk.store import staged_folder
from plait.fidelity.chat import chat_of
from plait.recipes.recipe_file import parse_recipe
from plait.runs.layout import Layout
from plait.runs.units import TRAIN, Unit
from tests.conftest import tiny_raw, write_rows
from tests.fidelity.test_chat import TEMPLATE, adapters_of


@pytest.mark.parametrize(("chat", "used"), [("prompt", True), (None, False)])
def test_what_a_run_trained_with_the_template_is_asked_with_it(tiny_base, make_panel, tmp_path, chat, used):
    panel = make_panel("llama", "causal")
    panel.tokenizer.chat_template = TEMPLATE
    names = [a.name for a in adapters_of(panel)]
    raw = tiny_raw(tiny_base("llama"), "llama", tmp_path / "data", [])
    write_rows(tmp_path / "data" / "rows.jsonl", [{"text": "w1", "label": f"w{i % 2}"} for i in range(10)])
    tasks = [{"name": n, "train": "rows.jsonl", "text": "text", "kind": "causal", "chat": chat} for n in names]
    layout = Layout(parse_recipe({**raw, "arms": ["kaiming"], "tasks": tasks}, "r"), tmp_path / "out")
    unit, adapters = Unit(TRAIN, 0, "kaiming", 0.02), []
    for adapter in adapters_of(panel):
        folder = tmp_path / adapter.name
        with staged_folder(folder, layout.wanted(unit, adapter.name)):
            pass
        assert trained_rows(folder)["label_column"] == "label" and trained_rows(folder).get("chat") == chat
        adapters.append(replace(adapter, source={"path": str(folder)}))
    found = chat_of(None, None, adapters, panel.tokenizer, 9)
    assert found.used is used and ("trained without the chat template" in found.notes[0]) is not used
    assert trained_rows(tmp_path) is None and trained_rows(tmp_path / "nowhere") is None
