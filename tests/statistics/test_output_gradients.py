"""Output gradients against autograd, example by example, and what becomes of them in files."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from plait.adapters.tensor_file import write_tensors
from plait.adapters.tensors import read_tensors
from plait.errors import InputError, RunError, UsageError
from plait.statistics import (
    check_statistics,
    collect_shards,
    collect_statistics,
    compress_statistics,
    diff_statistics,
    merge_statistics,
    open_statistics,
    read_statistics,
    show_statistics,
    write_statistics,
)
from plait.statistics.fisher import draw
from plait.statistics.output_gradients import collect_output_gradients, with_output_gradients
from tests.statistics.models import ATTENTION, batches, build


class Net(nn.Module):
    """Two layers on tokens; their mean, or every token, ends in a head."""

    def __init__(self, outputs, by_token=False):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first, self.second, self.head = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, outputs)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g))
        self.by_token = by_token

    def forward(self, input_ids, attention_mask):
        h = self.second(torch.tanh(self.first(input_ids)))
        if self.by_token:
            return SimpleNamespace(logits=self.head(torch.tanh(h.cumsum(1))))
        return SimpleNamespace(logits=self.head(torch.tanh(h.mean(1))))


def batch(n=6, length=3):
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(n, length, dtype=torch.long)
    mask[0, -1] = 0
    return {
        "input_ids": torch.randn(n, length, 5, generator=g),
        "attention_mask": mask,
        "labels": torch.zeros(n).long(),
    }


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("kind", ["classes", "regression", "text"])
def test_they_are_the_second_moment_of_drawn_gradients(kind, pool):
    net, given = Net(1 if kind == "regression" else 4, kind == "text"), batch()
    made = collect_output_gradients(
        net, [given], ["first", "second"], pool=pool, generator=torch.Generator().manual_seed(7)
    )
    # The same numbers one example and one token at a time: the gradient at the output is that at an added zero.
    g = torch.Generator().manual_seed(7)
    logits = net(given["input_ids"], given["attention_mask"]).logits.detach()
    if kind == "regression":
        noise = torch.randn(logits.shape, generator=g)
    elif kind == "classes":
        chosen = draw(logits.log_softmax(-1), g)
    else:
        chosen = torch.zeros(6, 2, dtype=torch.long)
        real = given["attention_mask"][:, 1:].bool()
        chosen[real] = draw(logits[:, :-1][real].log_softmax(-1), g)
    for name, width in (("first", 4), ("second", 3)):
        expected, total, rows = torch.zeros(width, width), torch.zeros(width), 0
        for i in range(6):
            shift = torch.zeros(1, 3, width, requires_grad=True)
            handle = getattr(net, name).register_forward_hook(lambda _, __, out, shift=shift: out + shift)
            out = net(given["input_ids"][i : i + 1], given["attention_mask"][i : i + 1]).logits[0]
            handle.remove()
            if kind == "regression":
                value = (out * noise[i]).sum()
            elif kind == "classes":
                value = out.log_softmax(-1)[chosen[i]]
            else:
                logs = out[:-1].log_softmax(-1).gather(1, chosen[i][:, None])[:, 0]
                value = (logs * given["attention_mask"][i, 1:]).sum()
            (gradient,) = torch.autograd.grad(value, shift)
            real = gradient[0][given["attention_mask"][i].bool()]  # what stands at a pad is not counted
            real = real.sum(0, keepdim=True) if pool == "mean" else real
            expected, total, rows = expected + real.T @ real, total + real.sum(0), rows + len(real)
        assert torch.allclose(made[name].dense(), expected, rtol=1e-4, atol=1e-6), name
        assert torch.allclose(made[name].total, total, rtol=1e-4, atol=1e-5)
        assert made[name].count == rows == (6 if pool == "mean" else 17)
        assert expected.norm() > 1e-3


def test_it_predicts_how_far_predictions_move():
    """KL(base || base + D) of a small update is tr(G D M D^T) / 2, where inputs and gradients are independent: one input."""
    net = Net(4)
    x = {
        "input_ids": torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(3)),
        "attention_mask": torch.ones(1, 1).long(),
    }
    many = {k: v.expand(4000, *v.shape[1:]) for k, v in x.items()}
    made = collect_output_gradients(net, [many], ["second"], generator=torch.Generator().manual_seed(0))["second"]
    G = made.dense() / made.count
    h = torch.tanh(net.first(x["input_ids"]))[0, 0].detach()
    D = 0.02 * torch.randn(3, 4, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        before = net(**x).logits.log_softmax(-1)
        net.second.weight += D
        after = net(**x).logits.log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum())
    assert float((D @ h) @ G @ (D @ h)) / 2 == pytest.approx(kl, rel=0.1)


def test_a_head_is_drawn_for_every_batch_and_nothing_is_refused_silently():
    net, seen = Net(4), []
    collect_output_gradients(net, [batch(), batch()], ["first"], before=seen.append)
    assert seen == [0, 1]
    assert collect_output_gradients(net, [], ["first"]) == {}
    with pytest.raises(UsageError, match="0 modules"):
        collect_output_gradients(net, [batch()], ["third"])
    for outputs, said in ((4, "what the model predicts is not finite"), (1, "first: a gradient is not finite")):
        net = Net(outputs)
        net.head.weight.data[0] = float("nan")
        with pytest.raises(RunError, match=said):
            collect_output_gradients(net, [batch()], ["first", "second"], generator=torch.Generator().manual_seed(0))


def drawn(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return build("roberta")


@pytest.fixture(scope="module")
def pair(model):
    """Statistics of two tasks at a tiny encoder with a head, with output gradients; and those of the first without."""
    made = []
    for i in range(2):
        given = batches("roberta", i, examples=24)
        own = collect_statistics(model, given, ["query", "dense"], provenance={"task": f"{i}", "base": "b"})
        made += [own, with_output_gradients(own, model, given, generator=drawn(i))]
    return made[1], made[3], made[0]


def test_a_file_holds_them_and_is_read_whole_or_one_by_one(pair, tmp_path):
    whole, _, without = pair
    path, again = tmp_path / "a.stats.safetensors", tmp_path / "b.stats.safetensors"
    write_statistics(path, whole)
    assert set(whole.output_gradients) == set(whole.modules)
    assert whole.provenance["output_gradients"] == {"answers": "drawn from the base", "head": "the base's own"}
    write_statistics(again, open_statistics(path))  # copied as bytes
    assert path.read_bytes() == again.read_bytes()
    write_statistics(again, replace(open_statistics(path), output_gradients=whole.output_gradients), overwrite=True)
    assert path.read_bytes() == again.read_bytes()
    for found in (read_statistics(path), open_statistics(path)):
        assert found.provenance == whole.provenance and found.modules == whole.modules
        for name, moments in whole.output_gradients.items():
            other = found.output_gradients_for(f"roberta.{name}")
            assert other.count == moments.count and other.form == moments.form and other.padded_total is None
            torch.testing.assert_close(other.dense(), moments.dense(), rtol=0, atol=1e-7 * moments.trace)
    write_statistics(again, without, overwrite=True)
    assert json.loads(read_tensors(again)[1]["statistics"])["schema"] == 1  # as earlier versions wrote and read it
    assert not read_statistics(again).output_gradients and not open_statistics(again).output_gradients


def test_damage_is_named(pair, tmp_path):
    path, name = tmp_path / "a", next(iter(pair[0].modules))
    write_statistics(path, pair[0])
    tensors, metadata, _ = read_tensors(path)
    record = json.loads(metadata["statistics"])
    assert record["schema"] == 2
    key = f"output_gradients/{name}"

    def broken(changed, record):
        write_tensors(tmp_path / "x", changed, {"kind": metadata["kind"], "statistics": json.dumps(record)})
        return tmp_path / "x"

    flipped = broken({**tensors, f"{key}|second": tensors[f"{key}|second"] * 1.001}, record)
    for act in (read_statistics, lambda p: open_statistics(p).output_gradients[name]):
        with pytest.raises(InputError, match=f"{key}.*not those that were written"):
            act(flipped)
    with pytest.raises(InputError, match=f"{key}.*has no tensor 'second'"):
        open_statistics(broken({k: v for k, v in tensors.items() if k != f"{key}|second"}, record))
    record["output_gradients"]["nowhere"] = record["output_gradients"].pop(name)
    with pytest.raises(InputError, match="output gradients of 'nowhere', no module of that width"):
        read_statistics(broken(tensors, record))


def test_they_add_up_shrink_and_compare(pair):
    one, two, without = pair
    both, name = merge_statistics(one, two), next(iter(one.modules))
    expected = one.output_gradients[name].dense() + two.output_gradients[name].dense()
    torch.testing.assert_close(both.output_gradients[name].dense(), expected, rtol=1e-5, atol=1e-9)
    assert both.provenance["output_gradients"] == one.provenance["output_gradients"]
    mixed = merge_statistics(two, without)
    assert not mixed.output_gradients and "output_gradients" not in mixed.provenance
    small = compress_statistics(one, 4)
    assert small.output_gradients[name].sketched
    assert small.output_gradients[name].trace == pytest.approx(one.output_gradients[name].trace, rel=1e-5)
    shown = show_statistics(one).output_gradients
    assert set(shown) == set(one.modules) and shown[name].dim == one.modules[name].shape[0]
    compared = diff_statistics(one, two)
    assert 0 < compared.output_gradients[name].overlap < 1 and not diff_statistics(two, without).output_gradients
    assert check_statistics(one).ok
    moments = one.output_gradients[name]
    odd = {name: replace(moments, second=moments.second - moments.trace * torch.eye(moments.dim))}
    assert any(
        f"output gradients of {name}: " in p for p in check_statistics(replace(one, output_gradients=odd)).problems
    )
    dead = {name: replace(moments, second=moments.second * 0, total=moments.total * 0)}
    told = check_statistics(replace(one, output_gradients=dead))
    assert told.ok and any(f"{name}: its output gradients are zero" in w for w in told.warnings)


def test_shards_hold_them_and_an_interruption_loses_none(model, tmp_path):
    given = batches("roberta", 2, examples=12)

    def collected(folder, upto):
        def beside(n, moments):
            if n == upto:
                raise KeyboardInterrupt
            return with_output_gradients(moments, model, [given[n]], generator=drawn(n))

        return collect_shards(model, [lambda i=i: [given[i]] for i in range(3)], folder, ["query"], beside=beside)

    whole = collected(tmp_path / "a", None)
    with pytest.raises(KeyboardInterrupt):
        collected(tmp_path / "b", 2)
    resumed = collected(tmp_path / "b", None)
    assert set(whole.output_gradients) == set(whole.modules)
    for name, moments in whole.output_gradients.items():
        assert torch.equal(moments.dense(), resumed.output_gradients[name].dense())
        assert moments.count == next(iter(whole.sites.values())).count


def test_calls_of_one_module_add_up():
    """DeBERTa's projections may read the positions too."""

    class Twice(Net):
        def forward(self, input_ids, attention_mask):
            once = self.second(torch.tanh(self.first(input_ids)))
            return SimpleNamespace(logits=self.head((once + self.second(input_ids[..., :4])).mean(1)))

    class Once(Twice):
        def forward(self, input_ids, attention_mask):
            both = self.second(torch.cat([torch.tanh(self.first(input_ids)), input_ids[..., :4]], 1))
            return SimpleNamespace(logits=self.head(both.mean(1) * 2))

    whole = {**batch(), "attention_mask": torch.ones(6, 3)}
    twice = collect_output_gradients(Twice(4), [whole], ["second"], generator=drawn(0))["second"]
    joined = {**whole, "attention_mask": torch.ones(6, 6)}
    once = collect_output_gradients(Once(4), [joined], ["second"], generator=drawn(0))["second"]
    assert twice.count == once.count == 36
    assert torch.allclose(twice.dense(), once.dense(), rtol=1e-4) and once.trace > 0


@pytest.mark.parametrize("architecture", ["deberta", "llama", "gpt2", "vit"])
def test_of_other_architectures(architecture):
    model, given = build(architecture), batches(architecture, 0)
    own = collect_statistics(model, given, ATTENTION[architecture], sketch=3)
    made = with_output_gradients(own, model, given, generator=drawn(0))
    assert set(made.output_gradients) == set(own.modules)
    for name, moments in made.output_gradients.items():
        assert moments.dim == own.modules[name].shape[0] and moments.trace > 0 and moments.second.shape[0] <= 3
