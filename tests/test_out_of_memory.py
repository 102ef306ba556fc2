"""Out of memory halves the batch and goes on; a disk that is too small is met before the work."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from plait.cli import main
from plait.disk.space import require_space
from plait.errors import EnvironmentFault
from plait.evaluation.evaluate import forward_logits
from plait.evaluation.text import choices, likelihoods, token_likelihoods, write_texts
from plait.merging import merge_folders
from plait.model.base import load_task_model, load_tokenizer
from plait.model.out_of_memory import by_parts, split
from plait.statistics import collect_statistics
from plait.tasks import Examples, batches, encode
from plait.training.checkpoints import bytes_of_training
from plait.training.settings import TrainingSettings
from tests.panels import random_adapter, texts_of
from tests.test_hub import write
from tests.tiny import make_task


class Small:
    """Raises out of memory in one module's call wherever more rows arrive than fit."""

    def __init__(self, module: torch.nn.Module, most: int, *, after: bool = False, spared: int = 0) -> None:
        self.most, self.seen, self.spared = most, [], spared
        hook = module.register_forward_hook if after else module.register_forward_pre_hook
        hook(lambda _m, given, *rest: self(given))

    def __call__(self, given: tuple[torch.Tensor, ...]) -> None:
        self.seen.append(len(given[0]))
        if len(given[0]) > self.most and len(self.seen) > self.spared:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def rows_of(base, kind: str, n: int = 22):
    labels = ("w1", "w2") if kind in ("causal", "seq2seq") else (0, 1)
    task = make_task("t", kind, 2)
    task = replace(task, labels=labels) if labels[0] else task
    examples = Examples(texts_of(n), tuple(labels[i % 2] for i in range(n)))
    tokenizer = load_tokenizer(base)
    return task, examples, tokenizer, encode(tokenizer, task, examples, 24)


def test_scoring_is_the_same_as_with_the_smaller_batch(tiny_base, capfd):
    base = tiny_base("bert")
    task, _, tokenizer, rows = rows_of(base, "classification")
    model = load_task_model(base, task, seed=0)
    wanted = forward_logits(model, tokenizer, rows, 4)
    capfd.readouterr()
    small = Small(model.bert.encoder.layer[1], 5)
    found = forward_logits(model, tokenizer, rows, 16)
    assert np.array_equal(found, wanted)
    assert small.seen == [16, 8, 4, 4, 4, 4, 4, 2]
    assert capfd.readouterr().err.count("out of memory with") == 2


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_text_scoring_and_writing(tiny_base, kind):
    base = tiny_base("llama" if kind == "causal" else "t5")
    task, examples, tokenizer, rows = rows_of(base, kind, 9)
    model = load_task_model(base, task, seed=0)
    prompts, ends = choices(tokenizer, task, examples, 24)

    def everything(size: int):
        scored = likelihoods(model, kind, prompts, ends, tokenizer.pad_token_id, size)
        written = write_texts(model, tokenizer, prompts, batch_size=size, new_tokens=3)
        return scored, token_likelihoods(model, tokenizer, task, rows, size), written

    wanted = everything(2)
    torch.manual_seed(1)  # of which what is written does not depend: greedily, not drawn
    small = Small(model.model.layers[0] if kind == "causal" else model.encoder.block[0], 2)
    found = everything(8)
    assert max(small.seen) > 2
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5)
    assert found[2] == wanted[2]


@pytest.mark.parametrize("where", [("layer", 0), ("layer", 1), ("value", 1), ("embeddings", 0)])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_collection_goes_on_wherever_the_pass_failed(tiny_base, capfd, where, pool):
    base = tiny_base("bert")
    task, _, tokenizer, rows = rows_of(base, "classification")
    model = load_task_model(base, task, seed=0)
    targets = ["query", "value", "dense"]

    def collected(size: int):
        given = list(batches(tokenizer, rows, size))
        return collect_statistics(model, given, targets, pool=pool)

    wanted = collected(2)
    layer = model.bert.encoder.layer[where[1]]
    module = {"layer": layer, "value": layer.attention.self.value, "embeddings": model.bert.embeddings.LayerNorm}[
        where[0]
    ]
    small = Small(module, 3, after=where[0] == "value")
    capfd.readouterr()
    found = collected(8)
    assert 8 in small.seen and small.seen[-1] <= 2
    assert "collected" in capfd.readouterr().err
    assert found.provenance["samples"] == wanted.provenance["samples"] == 22
    assert found.provenance["tokens"] == wanted.provenance["tokens"]
    for site, moments in wanted.sites.items():
        other = found.sites[site]
        assert other.count == moments.count
        torch.testing.assert_close(other.dense(), moments.dense(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.total, moments.total, rtol=1e-5, atol=1e-5)
    for name, info in wanted.modules.items():
        assert found.modules[name].output_energy == pytest.approx(info.output_energy, rel=1e-5)


def test_out_of_memory_inside_a_sum_leaves_it_as_it_was(tiny_base, monkeypatch):
    from plait.statistics import accumulate

    base = tiny_base("bert")
    task, _, tokenizer, rows = rows_of(base, "classification")
    model = load_task_model(base, task, seed=0)
    given = list(batches(tokenizer, rows, 8))
    wanted = collect_statistics(model, given, ["query", "dense"])
    original, calls = accumulate.add_gram, []

    def failing(S, added):
        calls.append(len(added))
        if len(calls) in (2, 5):
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(S, added)

    monkeypatch.setattr(accumulate, "add_gram", failing)
    found = collect_statistics(model, given, ["query", "dense"])
    assert len(calls) > 5
    for site, moments in wanted.sites.items():
        assert found.sites[site].count == moments.count
        torch.testing.assert_close(found.sites[site].dense(), moments.dense(), rtol=1e-5, atol=1e-5)


def test_one_row_that_does_not_fit_ends_it(tiny_base):
    base = tiny_base("bert")
    task, _, tokenizer, rows = rows_of(base, "classification")
    model = load_task_model(base, task, seed=0)
    Small(model.bert.encoder.layer[0], 0, spared=1)  # sites are found by one row
    for work in (
        lambda: collect_statistics(model, list(batches(tokenizer, rows, 8)), ["query"]),
        lambda: forward_logits(model, tokenizer, rows, 8),
    ):
        with pytest.raises(EnvironmentFault, match="one row at a time") as caught:
            work()
        assert caught.value.exit_code == 4


def test_other_errors_are_not_taken_for_it():
    def broken(part):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        by_parts(broken, [1, 2], 2, "scored")


def test_a_batch_in_parts():
    batch = {
        "input_ids": torch.arange(10).view(5, 2),
        "labels": torch.arange(5),
        "note": "x",
        "scale": torch.tensor(2.0),
    }
    parts = split(batch, 5, 2)
    assert [len(p["input_ids"]) for p in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([p["labels"] for p in parts]), batch["labels"])
    assert all(p["note"] == "x" and p["scale"] == 2 for p in parts)


# --- space ----------------------------------------------------------------------------------------------------------------


def full(monkeypatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - free, free))


def test_both_numbers_are_said(tmp_path, monkeypatch):
    full(monkeypatch, 5_000_000)
    require_space(tmp_path / "not" / "there", 4_000_000)
    with pytest.raises(EnvironmentFault, match=r"12\.0 MB are to be written, 5\.0 MB are free") as caught:
        require_space(tmp_path / "out", 12_000_000)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("how", ["merge", "bake", "auto", "featcal"])
def test_nothing_is_begun_that_does_not_fit(tiny_base, tmp_path, monkeypatch, capsys, how):
    base = tiny_base("bert")
    names = {n: write(tmp_path / n, random_adapter(base, "bert", n, "classification", s)) for s, n in enumerate("ab")}
    full(monkeypatch, 100)
    more = ["--bake", base.name] if how == "bake" else []
    before: list[str] = ["auto"] if how == "auto" else []
    if how == "featcal":
        (tmp_path / "texts.txt").write_text("w1 w2\nw3\n")
        before, more = [base.name], ["--method", "featcal", *(f"--text={n}={tmp_path / 'texts.txt'}" for n in names)]
    with pytest.raises(SystemExit) as ended:
        main(["merge", *before, *map(str, names.values()), *more, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 4 and "0.0 MB are free" in said, said
    assert not (tmp_path / "out").exists()
    assert not list(Path(tmp_path).glob(".out*"))


def test_a_cut_that_fits_is_made_where_the_whole_would_not(tiny_base, tmp_path, monkeypatch):
    base = tiny_base("bert")
    folders = [write(tmp_path / n, random_adapter(base, "bert", n, "classification", s)) for s, n in enumerate("ab")]
    full(monkeypatch, 100)
    with pytest.raises(EnvironmentFault, match=r"0\.0 MB are free"):
        merge_folders(folders, tmp_path / "out", method="svd")
    assert merge_folders(folders, tmp_path / "out", method="svd", rank=1).record.rank == 1


@pytest.mark.parametrize("how", ["convert", "export", "train"])
def test_neither_is_anything_else_whose_size_is_known(tiny_base, tmp_path, monkeypatch, capsys, how):
    base = tiny_base("bert")
    folder = write(tmp_path / "a", random_adapter(base, "bert", "a", "classification", 0))
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"w{i % 9} w{i % 7},{i % 2}\n" for i in range(20)), encoding="utf-8")
    arguments = {
        "convert": ["convert", str(folder), "--to", "peft", "--dtype", "float16"],
        "export": ["export", str(folder), "--for", "peft"],
        "train": ["train", str(folder), "--base", base.name, "--task", "a", "--train-file", str(rows), "--text", "text",
                  "--set", "training.steps=1"],
    }[how]  # fmt: skip
    full(monkeypatch, 100)
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 4 and "0.0 MB are free" in said, said
    assert not list(Path(tmp_path).glob("*out*"))
    assert not list(Path(tmp_path).glob(".out*"))


def test_what_a_training_writes_is_known_before(tiny_base):
    initial = random_adapter(tiny_base("bert"), "bert", "a", "classification", 0)
    size = sum(t.nbytes for f in initial.modules.values() for t in (f.A, f.B))
    size += sum(t.nbytes for t in next(iter(initial.heads.values())).values())
    plain = TrainingSettings(steps=4, checkpoint_every=None)
    kept = replace(plain, checkpoint_every=2, snapshots=(1, 2))
    assert initial.nbytes == size == bytes_of_training(initial, plain, begins=True)
    assert (
        bytes_of_training(initial, kept, begins=True) == 6 * size
    )  # itself, two snapshots, a checkpoint with two moments
    assert bytes_of_training(initial, kept, begins=False) == 3 * size
