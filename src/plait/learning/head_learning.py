"""Heads learnt: a copy of every classifier's head, moved together with the merge's weights towards what its adapter answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from plait.adapters.lora import Adapter
from plait.fidelity.panel import Panel
from plait.fidelity.record import HeadsLearnt
from plait.fidelity.score import fidelities
from plait.fidelity.texts import FEWEST, split_off
from plait.learning.distil import distil
from plait.learning.heads import with_heads
from plait.learning.teachers import HeadLoss

# Steps, and the rate of Adam for heads at the first of them; weights have their own (`distil.RATES`). Both fall to zero.
STEPS, RATE = 100, 3e-3

Groups = Mapping[str, Sequence[int]]


def with_learnt_heads(
    panel: Panel, merge: Adapter, groups: Groups, *, steps: int = STEPS, seed: int = 0
) -> tuple[Adapter, HeadsLearnt | None]:
    """Learn heads and weights together on three quarters of the texts; take them where the fourth says that they are closest.

    What they have to beat there, by the divergence that they learn from (`Fidelity.kept`, as a repair has it), is the better of the
    merge as it is and the merge whose heads were fitted in closed form to the same three quarters (`with_heads`); from that
    they start. Where they do, they are learnt again from all texts. The merge stays one adapter; only heads differ by task, as
    they did before.

    Args:
        panel: Base, adapters with heads, and texts.
        merge: The merge.
        groups: Module -> sizes of the groups of its ranks that have a weight each, such as one per adapter.
        steps: How many.
        seed: Seed of the order of the texts.

    Returns:
        The merge, with other weights and heads where that is closer; and what was seen, None where nothing could be learnt
        (text models, fewer than 12 texts of an adapter).

    Cost: twice `steps` of learning (`distil`).
    Source: SyMerge, Jung et al., ICML 2026 (arXiv:2412.19098): layer-wise weights and one layer of each task learnt together from
    unlabelled inputs, the single-task models as teachers.
    **Deviates**: whole heads, from those that were fitted, and no layer below them; KL over the base's own KL for each task (L2
    for values); the authors adapt to the inputs that are to be answered, this to other texts of the tasks, of which a quarter
    decides.
    """
    if panel.is_text or min(map(len, panel.texts.values())) < FEWEST:
        return merge, None
    most, rest = split_off(panel.texts)
    part, fourth = panel.with_texts(most, general=False), panel.with_texts(rest, general=False)
    refit = with_heads(part, merge)[0]
    tried = weights_and_heads(part, refit, groups, steps, seed)
    before, fitted, after = (f.kept for f in fidelities(fourth, [(a, 1.0) for a in (merge, refit, tried)]))
    kept = after > max(before, fitted)
    seen = HeadsLearnt(steps, {"merge": before, "fitted": fitted, "learnt": after}, kept)
    if not kept:
        return merge, seen
    whole = panel.with_texts(panel.texts, general=False)
    return weights_and_heads(whole, with_heads(whole, merge)[0], groups, steps, seed), seen


def weights_and_heads(panel: Panel, merge: Adapter, groups: Groups, steps: int, seed: int) -> Adapter:
    """Learn weights of the merge's parts and all heads together, on all texts of a panel; arguments as `with_learnt_heads`."""
    loss = HeadLoss(panel)
    heads: list[dict[str, Tensor]] = [
        {k: merge.heads.get(p.name, p.head)[k].to(v).clone().requires_grad_(True) for k, v in h.items()}
        for p, h in zip(panel.parts, loss.heads, strict=True)
    ]
    loss.heads = heads
    done = distil(
        panel,
        merge,
        learns="weights",
        groups=groups,
        steps=steps,
        seed=seed,
        loss=loss,
        beside=([t for h in heads for t in h.values()], RATE),
    )
    learnt = {
        p.name: {k: v.detach().to(p.head[k].dtype).cpu() for k, v in h.items()}
        for p, h in zip(panel.parts, heads, strict=True)
    }
    return replace(done.adapter, heads={**merge.heads, **learnt})
