"""`plait demo` from its first line to its last, on a tiny base: what it prints is what lies there."""

from __future__ import annotations

import json
import re

from tests.command import call


def test_the_demo_prints_its_table_its_floor_its_cost_and_what_to_type_next(tiny_recipe, tmp_path, monkeypatch, capsys):
    recipe = tiny_recipe("bert", tasks=["topic", "pairs"], arms=["kaiming"])
    monkeypatch.setattr("plait.demo.run.demo_recipe", lambda: recipe)
    out = tmp_path / "demo"
    code, said, err = call(capsys, "demo", "--out", out, "--quiet")
    assert code == 0, err
    assert (
        "kaiming" in said and "frozen base: a linear model" in said and re.search(r"This took \d+ CPU seconds\.", said)
    )
    assert f"plait try {out / 'best'} --prompt" in said
    code, again, _ = call(capsys, "demo", "--out", out, "--quiet", "--json")
    told = json.loads(again)
    assert (
        code == 0 and set(told["frozen_base"]) == {"topic", "pairs"} and told["cpu_seconds"] > 0 and told["units"] == 0
    )
