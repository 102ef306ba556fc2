"""`plait train`: statistics stand for a penalty unless something else is said, and the manifest records what was used."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.peft_format import read_adapter
from plait.cli import main
from plait.disk.store import read_manifest
from plait.errors import InputError
from plait.model.base import BaseModel
from plait.model.identity import base_facts
from plait.statistics import open_statistics
from plait.statistics.agreement import require_base
from tests.conftest import tiny_rows, write_rows


def plait(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    said = capsys.readouterr()
    return ended.value.code, said.out + said.err


@pytest.fixture
def prepared(tiny_base, tmp_path, capsys):
    """Options that describe a training, the folder to start from, and the statistics' files by task."""
    base, files, rows = tiny_base("bert"), {}, {}
    for i, task in enumerate(("one", "two", "three")):
        rows[task] = write_rows(tmp_path / f"{task}.csv", tiny_rows(2, 40, seed=i))
        files[task] = tmp_path / f"{task}.stats.safetensors"
        source = ["--base", base.name, "--task", task, "--train-file", rows[task], "--text", "text"]
        assert plait(capsys, "stats", *source, "--target-modules", "query", "--out", files[task])[0] == 0
    start = tmp_path / "start"
    others = [files["two"], files["three"]]
    assert plait(capsys, "init", "--own", files["one"], "--others", *others, "--rank", 2, "--out", start)[0] == 0
    source = ["--base", base.name, "--task", "one", "--train-file", rows["one"], "--text", "text", "--device", "cpu"]
    return [*source, "--set", "training.steps=6", "--set", "training.lr=0.05"], start, files


def given(files):
    return [x for path in files for x in ("--statistics", path)]


def constraint_of(folder):
    return read_manifest(folder)["options"]["training"]["constraint"]


def same(a, b):
    a, b = read_adapter(a).modules, read_adapter(b).modules
    return all(torch.equal(f.A, b[m].A) and torch.equal(f.B, b[m].B) for m, f in a.items())


def test_statistics_mean_a_penalty_unless_a_constraint_is_named(prepared, tmp_path, capsys):
    source, start, files = prepared
    everyone, free = given(files.values()), ["--set", "training.constraint=free"]
    runs = {
        "default": [*everyone],
        "penalised": [
            *everyone,
            "--set",
            "training.constraint=penalised",
            "--set",
            "training.constraint_options={beta: 1}",
        ],
        "without": [],
        "free": [*everyone, *free],
        "frozen": [*everyone, "--set", "training.constraint=frozen"],
    }
    for name, options in runs.items():
        code, said = plait(capsys, "train", start, *source, *options, "--out", tmp_path / name)
        wanted = {"default": "penalised", "without": "free"}.get(name, name)
        assert code == 0 and f"trained ({wanted})" in said
        assert constraint_of(tmp_path / name) == wanted
    assert same(tmp_path / "default", tmp_path / "penalised")
    assert same(tmp_path / "without", tmp_path / "free")
    assert not same(tmp_path / "default", tmp_path / "without")
    # Done is done; and a folder that was trained otherwise is not taken for it.
    before = read_manifest(tmp_path / "default")["result"]["seconds"]
    again = ["train", start, *source, *everyone, "--quiet", "--out", tmp_path / "default"]
    code, said = plait(capsys, *again, "--json")
    assert (code, json.loads(said)["constraint"], json.loads(said)["seconds"]) == (0, "penalised", before)
    code, said = plait(capsys, *again, *free)
    assert code == 2 and "constraint" in said
    # Of a free training statistics are no part: without them it is the same result.
    assert plait(capsys, "train", start, *source, "--out", tmp_path / "free")[0] == 0


def test_a_recipe_that_names_a_constraint_keeps_it(prepared, tmp_path, capsys):
    _, start, files = prepared
    tasks = [f"{{name: {t}, train: {tmp_path / t}.csv, text: [text]}}" for t in ("one", "two")]
    recipe, free = tmp_path / "recipe.yaml", "{name: mine, subspace: contrastive, training: {constraint: free}}"
    for i, (arms, training, wanted) in enumerate(
        (
            (free, "", "free"),
            (f"contrastive, {free}", "", "penalised"),
            ("contrastive", ", constraint: frozen", "frozen"),
        )
    ):
        recipe.write_text(
            f"base: {{model: {read_adapter(start).base}, device: cpu}}\ntasks: [{', '.join(tasks)}]\n"
            f"lora: {{target_modules: [query]}}\narms: [{arms}]\ntraining: {{steps: 2{training}}}\nmerges: [ties]\n"
        )
        out = tmp_path / f"out{i}"
        options = ["--recipe", recipe, "--task", "one", *given(files.values()), "--out", out]
        code, said = plait(capsys, "train", start, *options)
        assert code == 0 and constraint_of(out) == wanted, said


def test_a_fleet_is_penalised_as_a_single_training_is(prepared, tmp_path, capsys):
    source, start, files = prepared
    everyone = given(files.values())
    rates = ["--set", "training.lr=[0.05,0.02]"]
    fleet = ["train", f"a={start}", *source, *rates, *everyone, "--fleet", "--out", tmp_path / "f"]
    code, said = plait(capsys, *fleet)
    assert code == 0 and "a@lr0.05: one, penalised ->" in said
    assert plait(capsys, "train", start, *source, *everyone, "--out", tmp_path / "solo")[0] == 0
    assert plait(capsys, "train", start, *source, "--out", tmp_path / "without")[0] == 0
    solo, member, free = (read_adapter(tmp_path / f).modules for f in ("solo", "f/a@lr0.05", "without"))
    for module, f in solo.items():
        apart = (f.delta() - free[module].delta()).norm()
        assert (f.delta() - member[module].delta()).norm() < 1e-4 * f.delta().norm() < 0.1 * apart


def test_compressed_statistics_penalise_too(prepared, tmp_path, capsys):
    source, start, files = prepared
    small = [tmp_path / f"small-{path.name}" for path in files.values()]
    for path, to in zip(files.values(), small, strict=True):
        assert plait(capsys, "stats", "compress", path, "--rank", 2, "--out", to)[0] == 0
    for name, statistics in (("exact", files.values()), ("small", small), ("free", [])):
        assert plait(capsys, "train", start, *source, *given(statistics), "--out", tmp_path / name)[0] == 0
    exact, coarse, free = (read_adapter(tmp_path / f).modules for f in ("exact", "small", "free"))
    for module, f in exact.items():
        assert (f.delta() - coarse[module].delta()).norm() < 0.5 * (f.delta() - free[module].delta()).norm()


def test_what_no_penalty_can_be_made_of_is_named(prepared, tmp_path, capsys):
    source, start, files = prepared
    for statistics, message in (
        ([files["one"]], "needs statistics of this task and of others; given are those of one"),
        ([files["two"], files["three"]], "given are those of two, three"),
        ([*files.values(), files["two"]], "two statistics files of task 'two'"),
    ):
        code, said = plait(capsys, "train", start, *source, *given(statistics), "--out", tmp_path / "out")
        assert code == 2 and message in said.replace("\n", " ") and "Traceback" not in said
        assert not (tmp_path / "out").exists()
    free = ["--set", "training.constraint=free"]
    code, _ = plait(capsys, "train", start, *source, *given([files["one"]]), *free, "--out", tmp_path / "out")
    assert code == 0 and constraint_of(tmp_path / "out") == "free"


def test_init_says_what_trains_the_adapter_and_that_does(prepared, tmp_path, capsys):
    source, _, files = prepared
    others = [x for t in ("two", "three") for x in ("--others", files[t])]
    start = tmp_path / "a start"
    code, said = plait(capsys, "init", "--own", files["one"], *others, "--rank", 2, "--out", start)
    assert code == 0
    command = shlex.split(next(line for line in said.splitlines() if line.startswith("next: ")))
    assert command[1:4] == ["plait", "train", str(start)]
    code, said = plait(capsys, *command[2:], *source[4:])  # the base and the task are said
    assert code == 0, said
    assert constraint_of(tmp_path / "a start-trained") == "penalised"


def test_statistics_of_another_base_are_refused_by_name(prepared, tiny_base, tmp_path, capsys):
    source, start, files = prepared
    known = open_statistics(files["two"])
    facts, other = (
        base_facts(BaseModel(source[1])),
        {"base_sha256": "files:" + "0" * 64, "base_weights_sha256": "0" * 64},
    )
    require_base(known, "here", facts)
    require_base(known, "here", {"base_sha256": "commit:abc"})  # of another kind: nothing follows
    require_base(replace(known, provenance={**known.provenance, "quantisation": "bitsandbytes-4bit"}), "here", other)
    require_base(replace(known, provenance={}), "here", other)
    earlier = replace(known, provenance={"base": "here", "base_sha256": facts["base_weights_sha256"], "task": "two"})
    require_base(earlier, "here", facts)
    for statistics in (known, earlier):
        with pytest.raises(InputError, match=r"task two: the statistics were collected on .* not those of 'here'"):
            require_base(statistics, "here", other)
    weights = Path(source[1]) / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: t + 0.01 for k, t in tensors.items()}, weights, metadata={"format": "pt"})
    code, said = plait(capsys, "train", start, *source, *given(files.values()), "--out", tmp_path / "out")
    assert code == 3 and "collected on" in said and "Traceback" not in said, said
    assert not (tmp_path / "out").exists()
    free = ["--set", "training.constraint=free"]
    code, said = plait(capsys, "train", start, *source, *given(files.values()), *free, "--out", tmp_path / "out")
    assert code == 0, said


def test_options_are_used_or_refused(prepared, tmp_path, capsys):
    source, start, _ = prepared
    out = ["--out", tmp_path / "refused"]
    code, said = plait(capsys, "train", start, *source, "--target-modules", "zzz", *out)
    assert code == 2 and "--target-modules" in said, said
    other = write_rows(tmp_path / "other.csv", [{"sentence": "w1", "label": 0}, {"sentence": "w2", "label": 1}])
    code, said = plait(capsys, "train", start, *source, "--validation-file", other, *out)
    assert code == 3 and "text" in said and "other.csv" in said, said
    code, said = plait(capsys, "train", start, *source, "--validation-file", tmp_path / "nowhere.csv", *out)
    assert code == 3 and "nowhere.csv" in said, said
    assert not (tmp_path / "refused").exists()
