"""Curvature against autograd, example by example."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from plait.errors import UsageError
from plait.statistics.curvature import collect_curvature
from plait.statistics.fisher import draw


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


@pytest.mark.parametrize("kind", ["classes", "regression", "text"])
def test_curvature_is_the_second_moment_of_drawn_gradients(kind):
    net, given = Net(1 if kind == "regression" else 4, kind == "text"), batch()
    made = collect_curvature(net, [given], ["first", "second"], generator=torch.Generator().manual_seed(7))
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
        expected = torch.zeros(width, width)
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
            expected += gradient[0].T @ gradient[0]
        assert torch.allclose(made[name], expected, rtol=1e-4, atol=1e-6), name
        assert expected.norm() > 1e-3


def test_it_predicts_how_far_predictions_move():
    """KL(base || base + D) of a small update is tr(G D M D^T) / 2, where inputs and gradients are independent: one input."""
    net = Net(4)
    x = {
        "input_ids": torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(3)),
        "attention_mask": torch.ones(1, 1).long(),
    }
    many = {k: v.expand(4000, *v.shape[1:]) for k, v in x.items()}
    G = collect_curvature(net, [many], ["second"], generator=torch.Generator().manual_seed(0))["second"] / 4000
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
    collect_curvature(net, [batch(), batch()], ["first"], redraw=seen.append)
    assert seen == [0, 1]
    with pytest.raises(UsageError, match="no batches"):
        collect_curvature(net, [], ["first"])
    with pytest.raises(UsageError, match="0 modules"):
        collect_curvature(net, [batch()], ["third"])
