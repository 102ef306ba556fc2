"""A command repeated with something else that changes its result says so; it never takes the result of before for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from plait.runs.layout import Layout
from plait.runs.units import TRAIN, Unit
from tests.test_train_folders import plait, prepared  # noqa: F401  (a fixture)


def test_a_training_in_another_type_is_another(prepared, tmp_path, capsys):  # noqa: F811
    source, start, _ = prepared
    command = ["train", start, *source, "--out", tmp_path / "out"]
    assert plait(capsys, *command)[0] == 0 and plait(capsys, *command)[0] == 0
    code, said = plait(capsys, *command, "--set", "base.dtype=bfloat16")
    assert code == 2 and "options.dtype: absent -> bfloat16" in said


@pytest.mark.parametrize("alone", ["training.evaluate_every=2", "data.selection_rows=8"])
def test_choosing_a_moment_takes_rows_to_choose_by(prepared, tmp_path, capsys, alone):  # noqa: F811
    source, start, _ = prepared
    code, said = plait(capsys, "train", start, *source, "--set", alone, "--out", tmp_path / "out")
    assert code == 2 and "give both or neither" in said and not (tmp_path / "out").exists()


def test_patience_without_evaluations_is_refused(prepared, tmp_path, capsys):  # noqa: F811
    source, start, _ = prepared
    code, said = plait(capsys, "train", start, *source, "--set", "training.patience=3", "--out", tmp_path / "out")
    assert code == 2 and "patience is 3, expected none without evaluate_every" in said


@pytest.mark.parametrize("kind", ["--others", "--background"])
def test_statistics_of_one_name_in_two_folders_are_two_inputs(prepared, tmp_path, capsys, kind):  # noqa: F811
    _, _, files = prepared
    places = []
    for task in ("two", "three"):
        place = tmp_path / task / "task.stats.safetensors"
        place.parent.mkdir()
        places.append(shutil.copyfile(files[task], place))
    given = [word for place in places for word in (kind, place)]
    command = ["init", "--own", files["one"], *given, "--rank", 2, "--out", tmp_path / "started"]
    assert plait(capsys, *command)[0] == 0 and "was there already" in plait(capsys, *command)[1]
    fewer = tmp_path / "fewer.stats.safetensors"
    assert plait(capsys, "stats", "compress", files["two"], "--rank", 4, "--out", fewer)[0] == 0
    shutil.copyfile(fewer, Path(places[0]))
    code, said = plait(capsys, *command)
    assert code == 2 and f"{kind.removeprefix('--').removesuffix('s')} task.stats.safetensors: another" in said


def test_rows_that_are_kept_back_are_part_of_what_every_arm_is(tiny_recipe, tmp_path):
    arms = ["kaiming", {"name": "best", "subspace": "kaiming", "training": {"evaluate_every": 2}}]
    few, many = (Layout(tiny_recipe(arms=arms, data_selection=n, tasks=["topic"]), tmp_path) for n in (4, 12))
    for arm in ("kaiming", "best"):
        unit = Unit(TRAIN, 0, arm, 0.02)
        rows = [len(layout.session.training("topic", 0)) for layout in (few, many)]
        assert rows == [28, 20] and few.wanted(unit, "topic") != many.wanted(unit, "topic")
