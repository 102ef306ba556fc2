"""The Fisher diagonal: against autograd per example, its file, and fisher merging from it."""

from __future__ import annotations

import json
import pickle
import struct
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.tensor_file import write_tensors
from plait.errors import InputError, RunError, UsageError
from plait.merging import merge
from plait.merging.folders import read_statistics_files
from plait.statistics.fisher import FisherDiagonal, collect_fisher, is_fisher, read_fisher, write_fisher


class Classifier(nn.Module):
    def __init__(self, language_model: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.q, self.head = nn.Embedding(11, 6), nn.Linear(6, 5), nn.Linear(5, 11 if language_model else 3)
        self.language_model = language_model

    def forward(self, input_ids, attention_mask):
        h = torch.tanh(self.q(self.embed(input_ids)))
        if self.language_model:
            return SimpleNamespace(logits=self.head(h))
        mask = attention_mask[..., None].float()
        return SimpleNamespace(logits=self.head((h * mask).sum(1) / mask.sum(1)))


def batches():
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        ids = torch.randint(0, 11, (4, 7), generator=g)
        mask = torch.ones_like(ids)
        mask[:2, 5:] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 3, (4,), generator=g)}


def test_given_labels_equal_autograd_example_by_example():
    model = Classifier()
    found = collect_fisher(model, batches(), ["q"], labels="given")
    total, n = torch.zeros(5, 6), 0
    for batch in batches():
        for i in range(4):
            logits = model(batch["input_ids"][i : i + 1], batch["attention_mask"][i : i + 1]).logits
            loss = nn.functional.cross_entropy(logits, batch["labels"][i : i + 1])
            total += torch.autograd.grad(loss, model.q.weight)[0].square()
            n += 1
    torch.testing.assert_close(found.diagonal_for("q").rows(0, 5), total / n)
    assert found.examples == n == 12 and found.diagonal_for("other") is None
    assert all(p.grad is None for p in model.parameters())


def test_sampled_labels_approach_the_expectation_over_the_model():
    model = Classifier()
    exact, n = torch.zeros(5, 6), 0
    for batch in batches():
        for i in range(4):
            log_p = model(batch["input_ids"][i : i + 1], batch["attention_mask"][i : i + 1]).logits.log_softmax(-1)[0]
            for c in range(3):
                gradient = torch.autograd.grad(log_p[c], model.q.weight, retain_graph=True)[0]
                exact += float(log_p[c].exp().detach()) * gradient.square()
            n += 1
    many = [b for _ in range(200) for b in batches()]
    found = collect_fisher(model, many, ["q"], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.diagonal_for("q").rows(0, 5), exact / n, rtol=0.15, atol=1e-5)


def test_language_models_sum_over_predicted_tokens():
    model = Classifier(language_model=True)
    found = collect_fisher(model, batches(), ["q"], generator=torch.Generator().manual_seed(0))
    assert found.examples == 12 and float(found.diagonal_for("q").rows(0, 5).min()) >= 0


@pytest.mark.parametrize("padding", ["right", "left"])
def test_pads_on_either_side_foretell_nothing(padding):
    model = Classifier(language_model=True)
    ids = torch.randint(3, 11, (1, 5), generator=torch.Generator().manual_seed(3))
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    pads = torch.zeros(1, 2, dtype=torch.long)

    def sides(x, fill):
        return torch.cat([x, pads + fill] if padding == "right" else [pads + fill, x], 1)

    padded = {k: sides(x, fill) for (k, x), fill in zip(alone.items(), (0, 0, -100), strict=True)}
    whole, found = (
        collect_fisher(model, [b], ["q"], labels="given").diagonal_for("q").rows(0, 5) for b in (alone, padded)
    )
    torch.testing.assert_close(found, whole)


def test_one_number_a_row_is_no_distribution():
    model = Classifier()
    model.head = nn.Linear(5, 1)
    with pytest.raises(UsageError, match="logits of one number"):
        collect_fisher(model, batches(), ["q"])


class Spare(Classifier):
    """Has a layer that nothing depends on, and one that may never be called, or twice."""

    def __init__(self, calls: int):
        super().__init__()
        self.unused, self.called, self.calls = nn.Linear(6, 5), nn.Linear(6, 5), calls

    def forward(self, input_ids, attention_mask):
        self.unused(self.embed(input_ids))
        for _ in range(self.calls):
            self.called(input=self.embed(input_ids))
        return super().forward(input_ids, attention_mask)


def test_a_layer_that_nothing_depends_on_has_no_information():
    model = Spare(calls=1)
    found = collect_fisher(model, batches(), ["unused", "q", "called"], labels="given")
    alone = collect_fisher(Classifier(), batches(), ["q"], labels="given")
    assert [*found.modules] == ["unused", "q", "called"]
    assert not any(bool(found.diagonal_for(name).rows(0, 5).any()) for name in ("unused", "called"))
    torch.testing.assert_close(found.diagonal_for("q").rows(0, 5), alone.diagonal_for("q").rows(0, 5))


@pytest.mark.parametrize(("calls", "message"), [(0, "never called"), (2, "called twice")])
def test_a_layer_is_called_once(calls, message):
    with pytest.raises(RunError, match=message):
        collect_fisher(Spare(calls), batches(), ["called"])


class Elsewhere(Classifier):
    """Reads one row for all examples, as relative positions are read, or all tokens beneath each other."""

    def forward(self, input_ids, attention_mask):
        places = torch.arange(input_ids.shape[1])[None] if self.once else input_ids.flatten()
        h = torch.tanh(self.q(self.embed(places)))
        h = h.expand(len(input_ids), -1, -1) if self.once else h.view(*input_ids.shape, -1)
        mask = attention_mask[..., None].float()
        return SimpleNamespace(logits=self.head((h * mask).sum(1) / mask.sum(1)))


def test_a_module_that_does_not_tell_examples_apart_is_refused():
    model = Elsewhere()
    model.once = True
    with pytest.raises(RunError, match="for 4 examples, which it does not tell apart"):
        collect_fisher(model, batches(), ["q"])


def test_tokens_of_all_examples_beneath_each_other_are_those_of_each():
    model = Elsewhere()
    model.once = False
    found, right = (
        collect_fisher(m, batches(), ["q"], labels="given").diagonal_for("q").rows(0, 5) for m in (model, Classifier())
    )
    torch.testing.assert_close(found, right)


def test_given_tokens_equal_autograd_example_by_example():
    """The answer's tokens count, token 0 too; those of the prompt (-100) and of the padding do not."""
    model = Classifier(language_model=True)
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 11, (3, 7), generator=g)
    ids[:, 3] = 0
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = ids.clone()
    labels[:, :2] = -100
    found = collect_fisher(model, [{"input_ids": ids, "attention_mask": mask, "labels": labels}], ["q"], labels="given")
    total = torch.zeros(5, 6)
    for i in range(3):
        log_p = model(ids[i : i + 1], mask[i : i + 1]).logits.log_softmax(-1)[0]
        counted = [(place, int(ids[i, place])) for place in range(2, 7) if mask[i, place]]
        likelihood = sum(log_p[place - 1, token] for place, token in counted)
        total += torch.autograd.grad(likelihood, model.q.weight)[0].square()
    torch.testing.assert_close(found.diagonal_for("q").rows(0, 5), total / 3)
    assert (3, 0) in counted


def test_file_round_trip(tmp_path):
    kept = FisherDiagonal.held({"l.q": torch.rand(5, 6)}, 7, task="a")
    write_fisher(tmp_path / "a.fisher.safetensors", kept)
    read = read_fisher(tmp_path / "a.fisher.safetensors")
    assert is_fisher(tmp_path / "a.fisher.safetensors") and read.examples == 7 and read.provenance == {"task": "a"}
    assert torch.equal(read.diagonal_for("l.q").rows(1, 4), kept.diagonal_for("l.q").rows(1, 4))
    write_fisher(tmp_path / "b.safetensors", FisherDiagonal.held({"l.q": -torch.ones(2, 2)}, 1))
    with pytest.raises(InputError, match="nonnegative"):
        read_fisher(tmp_path / "b.safetensors")


DAMAGE = {
    "1 truncated": (lambda raw: raw[:-3], "not a whole safetensors file"),
    "2 zero bytes": (lambda _: b"", "0 bytes do not hold"),
    "3 header of 10^12": (lambda _: struct.pack("<Q", 10**12) + b"{}", "do not hold a safetensors header"),
    "6 HTML": (lambda _: b"<!DOCTYPE html><html>not found", "an HTML page"),
    "7 a pickle": (lambda _: pickle.dumps({"a": 1}, protocol=2), "a pickle"),
    "no record": (lambda raw: raw.replace(b'{\\"schema', b'[\\"schema'), "its record is not JSON"),
    "57 newer": (lambda raw: raw.replace(b'schema\\": 1', b'schema\\": 2'), "Fisher schema 2, this plait reads 1"),
    "no examples": (lambda raw: raw.replace(b"examples", b"exampels"), "its record.examples is absent"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named_where_a_merge_asks_for_them(tmp_path, damage):
    change, message = DAMAGE[damage]
    path = tmp_path / "a.fisher.safetensors"
    record = {"schema": 1, "examples": 7, "provenance": {"task": "a"}}  # as before files held a digest of themselves
    write_tensors(path, {"l.q": torch.rand(5, 6)}, {"kind": "plait.fisher", "fisher": json.dumps(record)})
    assert read_fisher(path).examples == 7
    raw = change(path.read_bytes())
    assert raw != path.read_bytes()
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message) as raised:
        read_statistics_files({"a": path})
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["absent", "."])
def test_statistics_that_are_no_file(tmp_path, name):
    with pytest.raises(InputError, match=r"no such file|not a regular file"):
        read_statistics_files({"a": tmp_path / name})


def test_tasks_that_care_win_the_entry():
    ads = [
        Adapter(n, "base", {"q": LoraFactors(torch.ones(1, 4), torch.full((3, 1), v))})
        for n, v in (("a", 1.0), ("b", 3.0))
    ]
    F = {n: FisherDiagonal.held({"q": torch.full((3, 4), f)}, 1) for n, f in (("a", 3.0), ("b", 1.0))}
    done = merge(ads, "fisher", statistics=F, scale=1.0)
    torch.testing.assert_close(done.adapter.modules["q"].delta(), torch.full((3, 4), 1.5))


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="0 modules of the model are named 'k'"):
        collect_fisher(Classifier(), batches(), ["k"])
    with pytest.raises(UsageError, match="no examples"):
        collect_fisher(Classifier(), [], ["q"])
    model = Classifier()
    model.head.weight.data.fill_(float("inf"))
    with pytest.raises((RunError, RuntimeError)):
        collect_fisher(model, batches(), ["q"])
