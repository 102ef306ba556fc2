"""A command repeated with something else that changes its result says so; it never takes the result of before for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from plait.runs.layout import Layout
from plait.runs.units import STATISTICS, TRAIN, Unit
from plait.tasks.tables import rows_sha256
from tests.conftest import tiny_rows
from tests.test_train_folders import plait, prepared  # noqa: F401  (a fixture)


def test_a_training_in_another_type_is_another(prepared, tmp_path, capsys):  # noqa: F811
    source, start, _ = prepared
    command = ["train", start, *source, "--out", tmp_path / "out"]
    assert plait(capsys, *command)[0] == 0 and plait(capsys, *command)[0] == 0
    code, said = plait(capsys, *command, "--set", "base.dtype=bfloat16")
    assert code == 2 and "options.dtype: not recorded -> bfloat16" in said


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


def test_a_name_on_the_hub_that_stands_for_other_rows_is_another_input(prepared, tmp_path, capsys, monkeypatch):  # noqa: F811
    import datasets

    source, _, _ = prepared
    asked: list[tuple[str, str | None]] = []
    rows = tiny_rows(2, 12)

    def load_dataset(name, config, *, split, revision):
        asked.append((name, revision))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    base = source[source.index("--base") : source.index("--base") + 2]
    task = ["--task", "posts", "--train-file", "hub:some/posts@v1:plain", "--text", "text"]
    command = ["stats", *base, *task, "--target-modules", "query", "--out", tmp_path / "a.stats.safetensors"]
    assert plait(capsys, *command)[0] == 0 and "was there already" in plait(capsys, *command)[1]
    assert set(asked) == {("some/posts", "v1")}
    rows[3] = {**rows[3], "text": f"{rows[3]['text']} w7"}
    code, said = plait(capsys, *command)
    assert code == 2 and "options.data.source.train: hub:some/posts@v1:plain:" in said


@pytest.mark.parametrize("form", ["statistics.sketch=4", "statistics.memory=1GB"])
def test_a_sketch_by_other_batches_is_another(prepared, tmp_path, capsys, form):  # noqa: F811
    source, _, _ = prepared
    plain = [
        "stats",
        *source[: source.index("--set")],
        "--target-modules",
        "query",
        "--out",
        tmp_path / "a.safetensors",
    ]
    other = ["--set", "statistics.batch_size=5"]
    assert (
        plait(capsys, *plain)[0] == 0 and "was there already" in plait(capsys, *plain, *other)[1]
    )  # sums are the same
    sketched = [*plain[:-1], tmp_path / "b.safetensors", "--set", form]
    assert plait(capsys, *sketched)[0] == 0 and "was there already" in plait(capsys, *sketched)[1]
    code, said = plait(capsys, *sketched, *other)
    assert code == 2 and "options.batch_size: 16 -> 5" in said


def test_a_run_of_sketches_by_other_batches_is_another(tiny_recipe, tmp_path):
    keys = [
        Layout(tiny_recipe(statistics={"batch_size": size, **form}), tmp_path).key(Unit(STATISTICS, 0, pool="token"))
        for form in ({}, {"sketch": 4})
        for size in (4, 8)
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_the_hash_of_rows_is_of_what_they_hold():
    rows = pa.Table.from_pylist(tiny_rows(2, 12))
    cut = pa.concat_tables([rows.slice(0, 5), rows.slice(5)]).replace_schema_metadata({"kept": "by somebody"})
    assert rows_sha256(cut) == rows_sha256(rows)
    assert rows_sha256(rows.slice(1, 6)) == rows_sha256(pa.Table.from_pylist(rows.slice(1, 6).to_pylist()))
    others = [rows.slice(1), rows.take([*range(11), 10]), rows.rename_columns(["text", "other"])]
    assert len({rows_sha256(t) for t in (rows, *others)}) == 4
