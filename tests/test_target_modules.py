"""What PEFT takes as target modules, in a recipe and at the prompt: suffixes, a regex, all-linear, and what narrows them."""

from __future__ import annotations

import json
import re

import pytest

from plait.adapters.peft_format import read_adapter
from plait.cli import main
from plait.errors import UsageError
from plait.model.base import load_task_model
from plait.recipes.recipe_file import parse_recipe
from plait.recipes.sections import LoraSpec
from plait.report.line import run
from plait.runs.session import Session
from plait.statistics import read_statistics
from tests.conftest import tiny_rows, write_rows

ONE = {"tasks": ["topic", "grade"], "arms": ["kaiming", "osrm"], "merges": ["task_arithmetic"]}


@pytest.mark.parametrize(
    ("lora", "wanted"),
    [
        (
            {"target_modules": ["query", "output.dense"], "exclude_modules": ["attention.output.dense"], "layers_to_transform": 1},
            {"layer.1.attention.self.query", "layer.1.output.dense"},
        ),
        (
            {"target_modules": "all-linear", "exclude_modules": r".*(pooler|attention|layer\.0).*"},
            {"layer.1.intermediate.dense", "layer.1.output.dense"},
        ),
        ({"target_modules": ["value"], "layers_to_transform": [0]}, {"layer.0.attention.self.value"}),
        ({"target_modules": r".*layer\.1\..*(query|value)"}, {"layer.1.attention.self.query", "layer.1.attention.self.value"}),
    ],
)  # fmt: skip
def test_a_recipe_narrows_its_targets_and_peft_loads_what_comes_out(tiny_recipe, tmp_path, lora, wanted):
    from peft import PeftModel

    recipe = tiny_recipe(**ONE, lora={"rank": 2, "alpha": 4, **lora})
    found = run(recipe, tmp_path / "out", quiet=True)
    wanted = {f"encoder.{name}" for name in wanted}
    assert set(read_statistics(tmp_path / "out/statistics/seed-0/topic.stats.safetensors").modules) == wanted
    session = Session(recipe)
    for arm in ("kaiming", "osrm"):
        folder = tmp_path / "out/adapters" / arm / "seed-0/topic"
        assert {n.removeprefix("bert.") for n in read_adapter(folder).modules} == wanted
        model = PeftModel.from_pretrained(load_task_model(session.base, session.tasks["topic"], seed=0), folder)
        layers = {n.partition("bert.")[2] for n, m in model.named_modules() if hasattr(m, "lora_A")}
        assert layers == wanted
    assert {n.removeprefix("bert.") for n in read_adapter(found["best"]).modules} == wanted
    assert run(recipe, tmp_path / "out", quiet=True)["units"] == 0
    other = tiny_recipe(**ONE, lora={"rank": 2, "alpha": 4, **lora, "exclude_modules": ["layer.0.attention.self.key"]})
    with pytest.raises(UsageError, match="other settings"):
        run(other, tmp_path / "out", quiet=True)


def test_what_narrows_is_recorded_only_where_it_is_given():
    plain, narrow = LoraSpec(target_modules=["q"]), LoraSpec(target_modules=["q"], layers_to_transform=[0, 2])
    assert plain.limits == {} and plain.recorded_targets == ("q",)
    assert narrow.limits == {"layers_to_transform": [0, 2]} and narrow.recorded_targets is None
    raw = {"base": {"model": "m"}, "tasks": ["sst2"], "arms": ["kaiming"], "training": {"steps": 1}, "merges": ["ties"]}
    for value in (-1, [1, -2], "first"):
        with pytest.raises(UsageError, match="layers_to_transform"):
            parse_recipe({**raw, "lora": {"target_modules": ["q"], "layers_to_transform": value}}, "r")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--target-modules", "query"], r"layer\.[01]\.attention\.self\.query"),
        (["--target-modules", "all-linear"], r"layer\.[01]\..*|pooler\.dense"),
        (["--target-modules", r".*\.1\..*(query|key)"], r"layer\.1\.attention\.self\.(query|key)"),
        (["--target-modules", "query", "--set", "lora.layers_to_transform=[1]"], r"layer\.1\.attention\.self\.query"),
        (["--target-modules", "all-linear", "--set", "lora.exclude_modules=[dense]"], r".*\.self\.(query|key|value)"),
    ],
)
def test_at_the_prompt(tiny_base, tmp_path, capsys, given, wanted):
    rows = write_rows(tmp_path / "one.csv", tiny_rows(2, 20))
    command = ["stats", "--base", tiny_base("bert").name, "--task", "one", "--train-file", str(rows), "--text", "text"]
    with pytest.raises(SystemExit) as ended:
        main([*command, *given, "--samples", "8", "--device", "cpu", "--out", str(tmp_path / "s"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0, found
    modules = read_statistics(tmp_path / "s").modules
    assert len(modules) > 1 or "layers" in given[-1]
    assert all(re.fullmatch(wanted, n.removeprefix("encoder.")) for n in modules)
