"""Results of a run that were damaged are done again by themselves, and nothing that is not plait's is touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from plait.disk.manifest import MANIFEST
from plait.errors import InputError, Unfinished, UsageError
from plait.recipes.recipe_file import parse_recipe
from plait.report.line import report_again, run
from tests.conftest import resealed, tiny_raw
from tests.test_pipeline import SCALED, snapshot


def hashes(out: Path) -> dict[str, str]:
    """Every file of a run but those that hold seconds: manifests, and the report, which tells them."""
    found = {name: digest for name, (_, digest) in snapshot(out).items()}
    return {n: d for n, d in found.items() if not n.endswith(MANIFEST) and not n.startswith(("report/", "runs.jsonl"))}


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "adapter weights flipped": ("adapters/kaiming/seed-0/topic/adapter_model.safetensors", flipped),
    "adapter weights gone": ("adapters/kaiming/seed-0/topic/adapter_model.safetensors", Path.unlink),
    "adapter config flipped": ("adapters/kaiming/seed-0/topic/adapter_config.json", flipped),
    "merged weights flipped": ("merged/kaiming/seed-0/task_arithmetic/adapter_model.safetensors", flipped),
    "merged weights gone": ("merged/kaiming/seed-0/task_arithmetic/adapter_model.safetensors", Path.unlink),
    "a merged head flipped": ("merged/kaiming/seed-0/task_arithmetic/heads/topic.safetensors", flipped),
    "the merged manifest cut": ("merged/kaiming/seed-0/task_arithmetic/plait.json", lambda p: p.write_text("{")),
    "the merged manifest flipped": ("merged/kaiming/seed-0/task_arithmetic/plait.json", flipped),
    "the merged manifest another's": ("merged/kaiming/seed-0/task_arithmetic/plait.json", lambda p: p.write_text("[]")),
    "the merged manifest gone": ("merged/kaiming/seed-0/task_arithmetic/plait.json", Path.unlink),
    "statistics flipped": ("statistics/seed-0/topic.stats.safetensors", flipped),
    "statistics cut": ("statistics/seed-0/topic.stats.safetensors", lambda p: p.write_bytes(p.read_bytes()[:50])),
    "the best flipped": ("best/adapter_model.safetensors", flipped),
    "answers emptied": ("scores/kaiming/seed-0/alone/answers.safetensors", lambda p: p.write_text("")),
    "answers flipped": ("scores/kaiming/seed-0/alone/answers.safetensors", flipped),
    "the report cut": ("report/report.json", lambda p: p.write_text("{}")),
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, tiny_base):
    """A finished run of one task: its recipe and folder, to be copied before it is damaged."""
    root = tmp_path_factory.mktemp("run")
    raw = tiny_raw(tiny_base("bert"), "bert", root / "data", ["topic"]) | SCALED
    recipe = parse_recipe(raw, "tiny")
    first = run(recipe, root / "out", quiet=True)
    return recipe, root / "out", first


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_done_again_by_itself(finished_run, tmp_path, capsys, damage):
    recipe, whole, first = finished_run
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    file, change = DAMAGE[damage]
    change(out / file)
    if file.startswith(("scores", "merged")):
        with pytest.raises((InputError, Unfinished)):  # until then nothing reads it as if it were whole
            report_again(out)
    again = run(recipe, out, quiet=True)
    assert again["units"] == (not file.startswith(("best", "report"))) and again["merged"] == first["merged"]
    assert "done again: " in (said := capsys.readouterr().err) and said.count("\n") == 1 and str(out) in said
    assert run(recipe, out, quiet=True)["units"] == 0
    assert hashes(out) == hashes(whole)
    assert not [p for p in out.rglob(".*") if p.name.endswith((".staging", ".replaced", ".lock"))]


def test_an_outdated_result_is_named_and_overwrite_mends_it(finished_run, tmp_path):
    recipe, whole, first = finished_run
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    merged = out / "merged/kaiming/seed-0/task_arithmetic"
    resealed(merged, schema=999)
    with pytest.raises(InputError, match="schema 999") as raised:
        run(recipe, out, quiet=True)
    assert str(merged) in str(raised.value)
    assert run(recipe, out, overwrite=True, quiet=True)["merged"] == first["merged"]


def test_files_of_somebody_in_a_units_place_are_not_replaced(finished_run, tmp_path):
    recipe, whole, _ = finished_run
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "best/thesis").write_text("years")
    before = snapshot(out)
    with pytest.raises(UsageError, match="thesis"):
        run(recipe, out, quiet=True)
    (tmp_path / "home/report").mkdir(parents=True)
    (tmp_path / "home/report/thesis").write_text("years")
    with pytest.raises(UsageError, match="holds no manifest"):
        run(recipe, tmp_path / "home", overwrite=True, quiet=True)
    assert snapshot(out) == before and list(snapshot(tmp_path / "home")) == ["report/thesis"]
