"""A memory budget: what it chooses, that the choice changes nothing, and that files are read site by site."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from plait.errors import InputError, UsageError
from plait.statistics import collect_statistics, open_statistics, read_statistics, write_statistics
from plait.statistics.budget import MemoryPlan, bytes_of, plan_memory
from plait.statistics.lazy import FileSites
from plait.subspaces import compute_subspaces
from tests.statistics.models import ATTENTION, batches, build
from tests.statistics.test_collect import relative_difference

LAYER = {"a": 64, "b": 128}
EXACT = 4 * (64**2 + 128**2 + 2 * (64 + 128))


def plan(allowed, *, layers=4, rows=10_000, groups=True, state=1000):
    names = [{f"{i}.{s}": d for s, d in LAYER.items()} for i in range(layers)]
    return plan_memory(allowed, names, rows=rows, batch_rows=50, state_bytes=state, groups=groups)


def test_the_most_exact_form_that_fits():
    spare = 4 * 128**2
    assert plan(4 * EXACT + spare).form == "exact"
    assert plan(4 * EXACT + spare - 1).layers == 3
    assert plan(2 * EXACT + spare + 1000).layers == 2
    alone = plan(4 * EXACT + spare - 1, groups=False)
    assert alone.form == "sketch" and alone.sketch >= 16 and alone.needed <= alone.allowed
    assert plan(4 * 4 * 20 * (64 + 128) + spare, rows=20).form == "exact"  # factors of 20 rows
    with pytest.raises(UsageError, match=r"do not hold the sums of 8 sites \(at least [\d,]+"):
        plan(1000)


def test_what_a_refusal_names_is_enough():
    for groups in (True, False):
        with pytest.raises(UsageError) as refused:
            plan(1000, groups=groups)
        least = int(str(refused.value).split("at least ")[1].split(", or")[0].replace(",", ""))
        assert plan(least, groups=groups).needed <= least


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("800m", 800 * 10**6), ("4096", 4096), ("2kb", 2000)]
)
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 parsecs", "0", "0.1", "1e9", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="not a size"):
        bytes_of(text)


@pytest.mark.parametrize("architecture", ATTENTION)
def test_layer_groups_change_nothing(architecture, tmp_path, monkeypatch):
    model, given = build(architecture), batches(architecture, 0, examples=12)
    plain = collect_statistics(model, given, "all-linear")
    # In a model this small the hidden states that groups keep outweigh the sums, so groups are imposed.
    monkeypatch.setattr("plait.statistics.grouped.plan_memory", lambda n, *_, **__: MemoryPlan("layers", n, n, 1))
    found = collect_statistics(model, given, "all-linear", memory=1, spool=tmp_path / "parts")
    assert found.provenance["memory"]["chosen"] == "exact, 1 layer at a time"
    assert isinstance(found.sites, FileSites) and list(found.modules) == list(plain.modules)
    assert {n: i.site for n, i in found.modules.items()} == {n: i.site for n, i in plain.modules.items()}
    assert relative_difference(plain, found) < 1e-6
    assert found.provenance["tokens"] == plain.provenance["tokens"]
    write_statistics(tmp_path / "grouped", found)
    again = read_statistics(tmp_path / "grouped")
    for site, moments in found.sites.items():
        assert torch.equal(again.sites[site].second, moments.second)


def test_a_budget_chooses_by_what_is_needed(tmp_path):
    model, given = build("llama", layers=12), batches("llama", 0, examples=8)
    whole = collect_statistics(model, given, "all-linear", memory=10**9)
    needed = whole.provenance["memory"]["needed"]
    assert whole.provenance["memory"]["chosen"] == "exact"
    plain = collect_statistics(model, given, "all-linear")
    assert relative_difference(plain, whole) == 0.0
    spooled = collect_statistics(model, given, "all-linear", memory=needed - 1, spool=tmp_path / "parts")
    layers = int(re.match(r"exact, (\d+) layers at a time", spooled.provenance["memory"]["chosen"])[1])
    assert 1 <= layers < 12 and spooled.provenance["memory"]["needed"] < needed
    assert relative_difference(plain, spooled) < 1e-6


def test_bad_budgets():
    model, given = build("llama"), batches("llama", 0)
    with pytest.raises(UsageError, match=r"do not hold the sums of 8 sites"):
        collect_statistics(model, given, "all-linear", memory=1000)
    with pytest.raises(UsageError, match="leave out sketch"):
        collect_statistics(model, given, "all-linear", memory=10**9, sketch=4)
    with pytest.raises(InputError, match="no batches"):
        collect_statistics(model, [], "all-linear", memory=10**9)


def test_wide_sites_on_a_small_budget_are_sketched(tmp_path):
    torch.manual_seed(0)
    model = Wide()
    given = [{"input_ids": torch.randint(0, 50, (2, 20))} for _ in range(30)]
    plain = collect_statistics(model, given, ["wide"])
    found = collect_statistics(model, given, ["wide"], memory=1_800_000)
    assert found.provenance["memory"]["chosen"] == "sketch" and found.provenance["sketch"] >= 16
    moments = found.sites["wide"]
    lost = float(torch.linalg.matrix_norm(plain.sites["wide"].dense() - moments.dense(), 2))
    assert moments.second.shape[0] == found.provenance["sketch"] and 0 < lost <= moments.error


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 512)
        self.mix = nn.Embedding(20, 512)
        self.wide = nn.Linear(512, 4)

    def forward(self, input_ids):
        return self.wide(self.embed(input_ids) + self.mix.weight)


def test_files_are_read_site_by_site(tmp_path, monkeypatch):
    model = build("roberta")
    paths = {}
    for i, task in enumerate("abc"):
        paths[task] = tmp_path / f"{task}.stats.safetensors"
        write_statistics(paths[task], collect_statistics(model, batches("roberta", i, examples=24), ["query", "dense"]))
    wanted = compute_subspaces("contrastive", {t: read_statistics(p) for t, p in paths.items()}, rank=2)
    read: list[str] = []
    plain = FileSites.__getitem__

    def counted(self, site):
        read.append(site)
        return plain(self, site)

    monkeypatch.setattr(FileSites, "__getitem__", counted)
    opened = {t: open_statistics(p) for t, p in paths.items()}
    assert not read
    found = compute_subspaces("contrastive", opened, rank=2)
    assert all(torch.equal(found["b"][m].A, s.A) for m, s in wanted["b"].items())
    assert len(read) == 3 * len(opened["a"].sites)
    assert all(len(set(read[i : i + 3])) == 1 for i in range(0, len(read), 3))  # one site of all tasks at a time
