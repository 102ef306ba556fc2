"""Whose rows a statistics file holds: known from files of this version and of earlier ones, so that none count twice."""

from __future__ import annotations

import pytest
import torch

from plait.disk.files import sha256_file
from plait.errors import UsageError
from plait.runs.single.pooled import compress_file, merge_files
from plait.statistics import files, merge_statistics, open_statistics, read_statistics, write_statistics
from plait.statistics.moments import ModuleInfo, Moments, Statistics


def collected(path, seed, curved=False, **identity):
    """A task's statistics as they are collected, of rows that the seed names; with output gradients or without."""
    H = torch.randn(30, 6, generator=torch.Generator().manual_seed(seed))
    moments = Moments(len(H), H.sum(0), H.T @ H)
    modules = {"q": ModuleInfo("q", (6, 6), 1.0)}
    own = Statistics({"q": moments}, modules, output_gradients={"q": moments} if curved else {})
    options = {"data": {"train": f"{seed}.csv"}, "samples": 30}
    write_statistics(
        path, own, identity={"stage": "statistics", "options": options, "seed": 0, "inputs": {}, **identity}
    )
    return path


def test_a_sum_of_an_earlier_version_remembers_the_hashes_of_its_files(tmp_path):
    one, two, three = (collected(tmp_path / f"{i}.stats.safetensors", i) for i in range(3))
    earlier = tmp_path / "earlier.stats.safetensors"
    inputs = {f"file {i}": sha256_file(f) for i, f in enumerate((one, two), 1)}
    added = merge_statistics(read_statistics(one), read_statistics(two))
    write_statistics(earlier, added, identity={"stage": "statistics merge", "options": {}, "inputs": inputs})
    for part in (one, two):
        with pytest.raises(UsageError, match="the same rows as in") as refused:
            merge_files([earlier, part], tmp_path / "out", overwrite=False)
        assert refused.value.where == str(part) and not (tmp_path / "out").exists()
    assert merge_files([earlier, three], tmp_path / "out", overwrite=False).merged == (str(earlier), str(three))
    assert open_statistics(tmp_path / "out").sites["q"].count == 90


def test_what_rows_were_collected_with_is_none_of_them(tmp_path):
    """The inputs of a collection (an adapter that the base wore, say) are no statistics."""
    one = collected(tmp_path / "one.stats.safetensors", 0)
    two = collected(tmp_path / "two.stats.safetensors", 1, inputs={"adapter": sha256_file(one)})
    assert not merge_files([one, two], tmp_path / "out", overwrite=False).reused


def test_files_without_hashes_of_their_moments_are_not_alike_for_that(tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(files, "content_hash", lambda parts: None)
        one, two = (collected(tmp_path / f"{i}.stats.safetensors", i) for i in range(2))
    merge_files([one, two], tmp_path / "out", overwrite=False)
    assert open_statistics(tmp_path / "out").sites["q"].count == 60
    smaller = compress_file(one, tmp_path / "small", 2, overwrite=False)
    assert smaller.rank == 2 and 0 < smaller.relative_error < 1
    with pytest.raises(UsageError, match="the same rows as in"):
        merge_files([one, tmp_path / "small"], tmp_path / "twice", overwrite=False)


def test_the_same_rows_collected_otherwise_are_the_same_rows(tmp_path):
    """A sketch has other moments; what it was collected from tells."""
    one = collected(tmp_path / "one.stats.safetensors", 0)
    options = {"data": {"train": "0.csv"}, "samples": 30, "sketch": 4}
    again = collected(tmp_path / "again.stats.safetensors", 7, options=options)
    with pytest.raises(UsageError, match="the same rows as in"):
        merge_files([one, again], tmp_path / "out", overwrite=False)
    fewer = collected(tmp_path / "fewer.stats.safetensors", 8, options={**options, "samples": 10})
    assert merge_files([one, fewer], tmp_path / "out", overwrite=False).merged


@pytest.mark.parametrize("computing", ["merge_statistics", "compress_statistics"])
def test_somebodys_file_is_refused_before_anything_is_computed(tmp_path, monkeypatch, computing):
    one, two = (collected(tmp_path / f"{i}.stats.safetensors", i) for i in range(2))
    monkeypatch.setattr(f"plait.runs.single.pooled.{computing}", lambda *_: pytest.fail("computed"))
    mine = tmp_path / "mine"
    mine.write_text("mine")
    with pytest.raises(UsageError, match="was not written by this command"):
        if computing == "merge_statistics":
            merge_files([one, two], mine, overwrite=True)
        else:
            compress_file(one, mine, 2, overwrite=True)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("curved", [(True, True), (True, False), (False, True), (False, False)])
def test_a_sum_says_where_it_leaves_output_gradients_out(tmp_path, curved):
    parts = [collected(tmp_path / f"{i}.stats.safetensors", i, c) for i, c in enumerate(curved)]
    for _ in range(2):  # made, and there already
        assert merge_files(parts, tmp_path / "out", overwrite=False).dropped_output_gradients == (len(set(curved)) == 2)
    assert bool(open_statistics(tmp_path / "out").output_gradients) == all(curved)
