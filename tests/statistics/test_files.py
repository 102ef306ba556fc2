"""Statistics files: round trips, damage, resuming, looking inside."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open

from plait.adapters.tensor_file import write_tensors
from plait.adapters.tensors import read_tensors
from plait.errors import InputError, UsageError
from plait.statistics import (
    check_statistics,
    collect_shards,
    collect_statistics,
    compress_statistics,
    diff_statistics,
    open_statistics,
    read_identity,
    read_statistics,
    show_statistics,
    write_statistics,
)
from plait.statistics.moments import Moments, Statistics
from tests.statistics.models import batches, build, padded, text


@pytest.fixture(scope="module")
def model():
    return build("roberta")


@pytest.fixture(scope="module")
def few(model):
    """Fewer tokens than d: factors."""
    return collect_statistics(model, [padded(text(0, 3))], ["query", "dense"], provenance={"task": "few", "base": "b"})


@pytest.fixture(scope="module")
def many(model):
    return collect_statistics(
        model, batches("roberta", 1, examples=24), ["query", "dense"], provenance={"task": "many", "base": "b"}
    )


@pytest.mark.parametrize("kind", ["few", "many", "sketch", "coarse"])
def test_round_trip_to_the_bit(kind, few, many, tmp_path):
    made = {
        "few": few,
        "many": many,
        "sketch": compress_statistics(many, 4),
        "coarse": compress_statistics(many, 4, tail=False),
    }
    statistics = made[kind]
    path = tmp_path / "x.stats.safetensors"
    write_statistics(path, statistics, identity={"stage": "stats", "n": 1})
    found = read_statistics(path)
    assert found.provenance == statistics.provenance and found.modules == statistics.modules
    for site, moments in statistics.sites.items():
        other = found.sites[site]
        assert (other.count, other.form, other.error, other.padded_count) == (
            moments.count,
            moments.form,
            moments.error,
            moments.padded_count,
        )
        symmetric = torch.triu(moments.dense()) + torch.triu(moments.dense(), 1).T
        torch.testing.assert_close(torch.triu(other.dense()), torch.triu(symmetric), rtol=0, atol=0)
        assert torch.equal(other.total, moments.total) and torch.equal(other.padded_total, moments.padded_total)
    assert read_identity(path) == {"n": 1, "stage": "stats"} and read_identity(tmp_path / "none") is None
    with pytest.raises(UsageError, match="exists"):
        write_statistics(path, statistics)
    write_statistics(path, statistics, overwrite=True)
    assert read_identity(path) is None


def test_no_row_of_the_data_is_in_the_file(model, few, tmp_path):
    write_statistics(tmp_path / "x", few)
    tensors, _, _ = read_tensors(tmp_path / "x")
    embedded = model.roberta.embeddings(padded(text(0, 3))["input_ids"])[0].detach()
    first = tensors["encoder.layer.0.attention.self.query|second"]
    cosines = torch.nn.functional.normalize(first, dim=1) @ torch.nn.functional.normalize(embedded, dim=1).T
    assert first.shape[0] > 8 and float(cosines[1:, 1:].abs().max()) < 0.999


def test_damaged_files_are_named(many, tmp_path):
    path = tmp_path / "x.stats.safetensors"
    write_statistics(path, many)
    tensors, metadata, _ = read_tensors(path)
    first = next(iter(many.sites))
    plain = json.loads(metadata.pop("statistics"))
    for site in plain["sites"].values():
        del site["sha256"]  # which would be the first to tell
    metadata = {"kind": metadata["kind"], "statistics": json.dumps(plain)}

    def broken(name, changed, record=None):
        write_tensors(tmp_path / name, changed, {**metadata, **(record or {})})
        return tmp_path / name

    with pytest.raises(InputError, match="do not fit width"):
        read_statistics(broken("short", {**tensors, f"{first}|second": tensors[f"{first}|second"][:-1].clone()}))
    with pytest.raises(InputError, match=r"has no tensor .total"):
        read_statistics(broken("missing", {k: v for k, v in tensors.items() if k != f"{first}|total"}))
    for more in ("cake", f"{first}|third", "none|total"):
        path = broken("more", {**tensors, more: torch.ones(3)})
        for read in (read_statistics, open_statistics):
            with pytest.raises(InputError, match=rf"{re.escape(more)}' belongs to no site of the record"):
                read(path)
    record = json.loads(metadata["statistics"])
    with pytest.raises(InputError, match="schema 9, this plait reads 1"):
        read_statistics(broken("new", tensors, {"statistics": json.dumps({**record, "schema": 9})}))
    with pytest.raises(InputError, match="holds no statistics"):
        read_statistics(broken("other", tensors, {"kind": "cake"}))
    cut = tmp_path / "cut"
    cut.write_bytes((tmp_path / "x.stats.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match="not a whole safetensors"):
        read_statistics(cut)


def test_show_diff_and_check(few, many):
    shown = show_statistics(many)
    site = next(iter(many.sites))
    assert json.loads(json.dumps(asdict(shown)))["sites"].keys() == shown.sites.keys()
    values = torch.linalg.eigvalsh(many.sites[site].dense().double())
    assert shown.sites[site].top1 == pytest.approx(float(values[-1] / values.sum()), rel=1e-5)
    assert 1 <= shown.sites[site].effective_rank <= many.sites[site].dim
    assert show_statistics(few).sites[site].form == "factor"
    compared = diff_statistics(few, many)
    assert compared.compatible and compared.provenance["task"] == ("few", "many")
    assert 0 < compared.sites[site].overlap < 1
    assert diff_statistics(many, many).sites[site].relative_difference == 0.0
    good = check_statistics(few)
    assert good.ok and any("null space" in w for w in good.warnings)
    assert any("sketched" in w for w in check_statistics(compress_statistics(many, 4)).warnings)


@pytest.mark.parametrize(
    ("length", "problems"), [(3.99, ()), (4.01, ("site: the mean is longer than the second moment allows",))]
)
def test_the_mean_of_inputs_is_no_longer_than_their_second_moment_says(length, problems):
    second = torch.diag(torch.tensor([3.0, 1.0, 0.0]))  # of four inputs: their sum is at most 4 long
    moments = Moments(4, torch.tensor([0.6, 0.8, 0.0]) * length, second)
    assert check_statistics(Statistics({"site": moments}, {})).problems == problems


def test_one_negative_eigenvalue_is_one_too_many():
    moments = Moments(4, torch.zeros(3), torch.diag(torch.tensor([2.0, -1.0, 3.0])))
    (problem,) = check_statistics(Statistics({"site": moments}, {})).problems
    assert problem == "site: not positive semidefinite: eigenvalues from -1 to 3"


def test_check_finds_what_cannot_be(many):
    from dataclasses import replace

    site, moments = next(iter(many.sites.items()))
    indefinite = replace(moments, second=moments.second - 0.5 * moments.trace * torch.eye(moments.dim) / moments.dim)
    broken = replace(many, sites={**many.sites, site: indefinite})
    assert any("positive semidefinite" in p for p in check_statistics(broken).problems)
    long = replace(many, sites={**many.sites, site: replace(moments, total=moments.total * 1e3)})
    assert any("mean is longer" in p for p in check_statistics(long).problems)


def test_an_interrupted_collection_resumes_to_the_same_bits(model, tmp_path):
    given = batches("roberta", 2, examples=12)
    calls: list[int] = []

    def shard(i, fail=False):
        def make():
            if fail:
                raise KeyboardInterrupt
            calls.append(i)
            return [given[i]]

        return make

    whole = collect_shards(model, [shard(i) for i in range(3)], tmp_path / "a", ["query"], key={"data": 1})
    with pytest.raises(KeyboardInterrupt):
        collect_shards(model, [shard(0), shard(1), shard(2, fail=True)], tmp_path / "b", ["query"], key={"data": 1})
    calls.clear()
    resumed = collect_shards(model, [shard(i) for i in range(3)], tmp_path / "b", ["query"], key={"data": 1})
    assert calls == [2]
    for site, moments in whole.sites.items():
        assert torch.equal(moments.second, resumed.sites[site].second)
    assert resumed.modules == whole.modules
    with pytest.raises(UsageError, match=r"another collection: options.key.data: 1 -> 2"):
        collect_shards(model, [shard(i) for i in range(3)], tmp_path / "b", ["query"], key={"data": 2})


def test_the_file_is_readable_by_others_and_small(many, tmp_path):
    path = tmp_path / "x"
    write_statistics(path, many)
    assert path.stat().st_mode & 0o044
    floats = sum(m.dim * (m.dim + 1) // 2 + 2 * m.dim for m in many.sites.values())
    with safe_open(path, framework="pt") as opened:
        assert len(list(opened.keys())) == 3 * len(many.sites)
    assert path.stat().st_size < 4 * floats + 8000
