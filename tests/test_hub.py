"""Adapters and bases by their names on the hub, from a cache made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from plait.adapters.lora import Adapter
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.disk import hub
from plait.disk.store import identity, read_manifest, staged_folder
from plait.errors import InputError
from plait.model.base import BaseModel, load_task_model, load_tokenizer
from plait.model.identity import base_fingerprint
from plait.tasks import Source, Task
from tests.command import call
from tests.conftest import tiny_rows, write_rows
from tests.hub_cache import cached, use_cache
from tests.panels import random_adapter

WEIGHTS = "adapter_model.safetensors"


def write(folder: Path, adapter: Adapter) -> Path:
    with staged_folder(folder, identity("adapter", {"name": adapter.name}), result={"task": adapter.name}) as stage:
        write_adapter(stage, adapter)
    return folder


@pytest.fixture
def published(tmp_path, tiny_base, monkeypatch):
    """Two classifiers and a base on the "hub", and the same as folders."""
    base = tiny_base("bert")
    folders = {}
    for seed, name in enumerate(("a", "b")):
        adapter = random_adapter(BaseModel(base.name, device="cpu"), "bert", name, "classification", seed)
        object.__setattr__(adapter, "base", "alice/base")
        folders[name] = write(tmp_path / "folders" / name, adapter)
    cache = tmp_path / "cache"
    commits = {n: cached(cache, f"{u}/{n}", f) for u, (n, f) in zip(("alice", "bob"), folders.items(), strict=True)}
    commits["base"] = cached(cache, "alice/base", Path(base.name))
    use_cache(monkeypatch, cache)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folders, commits, Path(base.name), cache


def test_two_hub_ids_merged_and_baked_equal_the_folders(published, tmp_path, capsys):
    folders, commits, base, _ = published
    code, _, said = call(capsys, "merge", "alice/a", "bob/b", "--out", tmp_path / "by-id")
    assert code == 0, said
    code, _, said = call(capsys, "merge", folders["a"], folders["b"], "--out", tmp_path / "by-folder")
    assert code == 0, said
    mine, theirs = tmp_path / "by-id", tmp_path / "by-folder"
    for file in (WEIGHTS, "adapter_config.json"):
        assert (mine / file).read_bytes() == (theirs / file).read_bytes()
    record = read_manifest(mine)
    assert record is not None
    assert [a["hub"] for a in record["result"]["adapters"]] == [f"alice/a@{commits['a']}", f"bob/b@{commits['b']}"]
    assert record["inputs"]["hub:a"] == f"alice/a@{commits['a']}"
    assert "hub:a" not in (read_manifest(theirs) or {})["inputs"]

    code, _, said = call(capsys, "merge", "alice/a", "bob/b", "--bake", "alice/base@main", "--out", tmp_path / "baked")
    assert code == 0, said
    code, _, said = call(capsys, "merge", *folders.values(), "--bake", base, "--out", tmp_path / "baked-folder")
    assert code == 0, said
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("baked", "baked-folder"))
    assert sorted(one) == sorted(two) and all((one[k] == two[k]).all() for k in one)
    original = load_file(base / "model.safetensors")
    assert any((one[k] != original[k]).any() for k in one)
    assert not any(p.is_symlink() for p in (tmp_path / "baked").rglob("*"))
    assert (read_manifest(tmp_path / "baked") or {})["inputs"]["hub:base"] == f"alice/base@{commits['base']}"


def test_names_revisions_and_the_same_name_twice(published, tmp_path, capsys):
    folders, _, _, cache = published
    other = tmp_path / "other" / "a"
    shutil.copytree(folders["b"], other)
    (other / "plait.json").unlink()
    commit = cached(cache, "alice/a", other, ref="v2")
    code, _, said = call(capsys, "merge", "old=alice/a", "new=alice/a@v2", "--out", tmp_path / "m")
    assert code == 0, said
    assert [a["name"] for a in (read_manifest(tmp_path / "m") or {})["result"]["adapters"]] == ["old", "new"]
    assert read_adapter(f"alice/a@{commit}").source["hub"] == f"alice/a@{commit}"
    assert read_adapter("alice/a@v2").name == "a"  # without a manifest: the repository's name, not the commit
    cached(cache, "carol/a", folders["a"])
    code, _, said = call(capsys, "merge", "alice/a", "carol/a", "--out", tmp_path / "n")
    assert code == 2 and "alice-a=alice/a@" in said and "carol-a=carol/a@" in said, said


def test_every_reader_takes_ids(published, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.csv", tiny_rows(3, 12))
    described = ["--base", "alice/base", "--task", "a", "--train-file", rows, "--text", "text", "--device", "cpu"]
    for command in (
        ["inspect", "alice/a"],
        ["advise", "alice/a", "bob/b"],
        ["advise", "alice/base", "alice/a", "bob/b", "--device", "cpu"],
        ["convert", "alice/a", "--to", "peft", "--out", tmp_path / "converted"],
        ["eval", "alice/a", *described],
        ["eval", "a=alice/a@main", *["alice/base@main" if d == "alice/base" else d for d in described]],
        ["train", "alice/a", *described, "--set", "training.steps=1", "--out", tmp_path / "trained"],
        ["merge", "alice/a", "bob/b", "--out", tmp_path / "m"],
        ["edit", tmp_path / "m", "--weight", "a=0.5", "--out", tmp_path / "edited"],
        ["edit", tmp_path / "m", "--remove", "b", "--add", "c=bob/b", "--out", tmp_path / "again"],
    ):
        code, out, said = call(capsys, *command)
        assert code == 0, (command, said)
        if command[0] == "inspect":
            assert out.startswith("a: ")
    trained = (read_manifest(tmp_path / "trained") or {})["result"]
    assert trained["base_sha256"].startswith("commit:")
    assert (
        json.loads((tmp_path / "trained" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "alice/base"
    )


def test_a_base_of_the_hub_is_known_by_its_commit(published):
    _, commits, folder, _ = published
    base = BaseModel("alice/base", device="cpu")
    assert base_fingerprint(base) == f"commit:{commits['base']}"
    assert base_fingerprint(BaseModel(str(folder), device="cpu")).startswith("files:")
    assert len(load_tokenizer(base)) == 65
    task = Task("t", "classification", Source("none"), ("text",), labels=("a", "b"))
    one, two = (load_task_model(b, task, seed=0).state_dict() for b in (base, BaseModel(str(folder), device="cpu")))
    assert all((one[k] == two[k]).all() for k in two)


def test_a_folder_of_that_name_wins_and_is_said(published, tmp_path, capsys):
    folders, _, _, _ = published
    shutil.copytree(folders["b"], Path("alice") / "a")
    hub._say_which.cache_clear()
    code, out, said = call(capsys, "inspect", "alice/a", "--json")
    assert code == 0
    assert json.loads(out)["name"] == "b" and "hub" not in json.loads(out)
    assert said == "note: alice/a is a folder here and a repository in the hub's cache: the folder is taken\n"


@pytest.mark.parametrize("given", ["nobody/nothing", "alice/a@v9", "NAME=nobody/nothing", "alice/a@" + 40 * "0"])
def test_what_is_neither_gives_the_way_out(published, tmp_path, capsys, given):
    code, _, said = call(capsys, "merge", given, "bob/b", "--out", tmp_path / "m")
    assert code == 3
    assert said.count("\n") == 1 and "hf download" in said and "no such adapter" in said, said
    assert not (tmp_path / "m").exists()


def test_a_misspelt_path_is_never_looked_for_elsewhere(published, monkeypatch):
    def asked(*arguments, **options):
        raise AssertionError(f"the hub was asked for {arguments}")

    monkeypatch.setattr(hub, "snapshot", asked)
    (Path("alice")).mkdir()
    for text in ("alice/misspelt", "./alice/a", "/alice/a", "alice/a/b", "alice", "~/alice", "alice/../a", "a b/c"):
        with pytest.raises(InputError, match=r"no such adapter folder|no adapter_config\.json"):
            read_adapter(text)


def test_a_snapshot_without_an_adapter_or_half_of_one(published, tmp_path, capsys):
    folders, _, _, cache = published
    code, _, said = call(capsys, "inspect", "alice/base")
    assert code == 3 and said.count("\n") == 1, said
    half = tmp_path / "half"
    shutil.copytree(folders["a"], half)
    (half / WEIGHTS).unlink()
    (half / "adapter_model.bin").write_bytes(b"\x80\x02")
    cached(cache, "alice/half", half)
    code, _, said = call(capsys, "merge", "alice/half", "bob/b", "--out", tmp_path / "m")
    assert code == 3 and said.count("\n") == 1, said


def test_parts_of_names():
    assert hub.split_revision("user/a@v1") == ("user/a", "v1")
    assert hub.split_revision("a@refs/pr/1") == ("a", "refs/pr/1")
    assert hub.split_revision("/tmp/a@v1") == ("/tmp/a@v1", None)
    assert hub.split_revision("user/a") == ("user/a", None)
    for text in ("user/a", "a", "user/a.b-c_d", "user/a@main"):
        assert hub.is_hub_name(text)
    for text in ("", "/a", "./a", "a/b/c", "a b", "~/a", "user/a@", "../a", "user/a@../b", "a\nb", ".", ".."):
        assert not hub.is_hub_name(text)
