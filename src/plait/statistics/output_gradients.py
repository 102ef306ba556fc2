"""How much what a base predicts moves with each module's outputs: second moments of the gradients there, one a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.errors import RunError, UsageError
from plait.model.hooks import differentiable_outputs, modules_named
from plait.statistics.accumulate import SiteSums, exact_matmul
from plait.statistics.agreement import OUTPUT_GRADIENTS
from plait.statistics.distributed import adds_over_ranks, reduce_statistics
from plait.statistics.fisher import draw
from plait.statistics.masks import MAIN, BatchMasks, Positions, sent
from plait.statistics.moments import Moments, Statistics


def collect_output_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    modules: Sequence[str],
    *,
    pool: str = "token",
    sketch: int | None = None,
    before: Callable[[int], None] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Moments]:
    """Sum g g^T over tokens, g the gradient at a module's output of log p(y | x), y drawn from the model itself.

    It is the output side of the Kronecker-factored Fisher information: with the inputs' second moment M beside it, an update
    D of the module moves what the model predicts by about tr(G D M D^T) / 2 nats.

    Args:
        model: Called as ``model(**batch).logits``: (n, classes), (n, 1) of a regression, whose y is drawn with unit variance,
            or (n, tokens, vocabulary) of a language model, which draws every next token. Left in its mode.
        batches: What the model takes; pads are told by ``attention_mask``, labels are not looked at.
        modules: Names relative to the backbone.
        pool: "token", or "mean" beside inputs of which every example gave one mean: then an example's gradients are added up
            first (the reduced form of K-FAC).
        sketch: Rank of a sketch; None for exact moments.
        before: Called with the number of each batch before it, to draw a head anew where the base has none: what several
            heads that nobody has trained ask of the outputs stands for what any head may ask.
        generator: Draws y, on the CPU.

    Returns:
        Module -> moments of its gradients, on the CPU; G is the `second` of them. Empty without batches.

    Raises:
        UsageError: A module that is not in the model.
        RunError: A gradient, or what the model predicts, is not finite.

    Cost:
        One forward and one backward pass, and out^2 multiplications a token and module; out^2 numbers a module in memory.

    Source: Martens and Grosse, K-FAC, arXiv 1503.05671; pooled: Eschenhagen et al., arXiv 2311.00636. As a penalty beside M: TAK,
    arXiv 2602.17385; DELTA, arXiv 2605.18993.
    """
    layers = modules_named(model, modules)
    sums: dict[str, SiteSums] = {}
    was_training = model.training
    model.eval()
    try:
        with exact_matmul():
            for number, batch in enumerate(batches):
                if before is not None:
                    before(number)
                if layers:
                    _add(sums, _gradients(model, batch, layers, generator), batch, pool, sketch)
    finally:
        model.train(was_training)
    # What stands at pads is zero: sums over all positions would say nothing else.
    finished = {n: s.finish().to("cpu") for n, s in sums.items()}
    return {n: replace(m, padded_count=0, padded_total=None) for n, m in finished.items()}


def with_output_gradients(
    statistics: Statistics,
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    before: Callable[[int], None] | None = None,
    generator: torch.Generator | None = None,
    drawn_heads: bool = False,
) -> Statistics:
    """Add the moments of the output gradients to statistics, at all their modules but routers.

    They are pooled and sketched as the inputs' moments were. Under torch.distributed the sums of all ranks are added.

    Args:
        statistics: Moments of inputs, taken from the same batches.
        model: The model, with a head; see `collect_output_gradients`.
        batches: Of this rank.
        before: Called with the number of each batch, as in `collect_output_gradients`.
        generator: Draws y, on the CPU.
        drawn_heads: Whether `before` draws a head, for the record.

    Raises:
        UsageError: No batches, or a module that is not in the model.
        RunError: A gradient that is not finite.
    """
    provenance = statistics.provenance
    names = [n for n, info in statistics.modules.items() if not info.is_router]
    pool, sketch = str(provenance.get("pool") or "token"), provenance.get("sketch")
    gradients = collect_output_gradients(
        model, batches, names, pool=pool, sketch=sketch, before=before, generator=generator
    )
    if adds_over_ranks(None):
        own = Statistics(gradients, {}, {"samples": 0, "tokens": 0}) if gradients else None
        gradients = dict(reduce_statistics(own).sites)
    if names and not gradients:
        raise UsageError("no batches to collect output gradients from")
    head = "drawn for every batch" if drawn_heads else "the base's own"
    record = {**provenance, OUTPUT_GRADIENTS: {"answers": "drawn from the base", "head": head}}
    return replace(statistics, output_gradients=gradients, provenance=record)


def _gradients(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    layers: Mapping[str, nn.Module],
    generator: torch.Generator | None,
) -> list[tuple[str, Tensor]]:
    """Module and gradient, once for every call of the module; zeros where nothing that is predicted depends on it."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    seen: list[tuple[str, Tensor]] = []
    with differentiable_outputs(layers, lambda name, _, y: seen.append((name, y))), torch.enable_grad():
        drawn = _drawn_likelihood(model(**inputs).logits, batch.get("attention_mask"), generator)
        gradients = torch.autograd.grad(drawn, [y for _, y in seen], materialize_grads=True)
    return [(name, g) for (name, _), g in zip(seen, gradients, strict=True)]


def _add(
    sums: dict[str, SiteSums],
    gradients: Sequence[tuple[str, Tensor]],
    batch: Mapping[str, Tensor],
    pool: str,
    sketch: int | None,
) -> None:
    """Add the gradients of one batch, pads left out."""
    device = gradients[0][1].device
    masks, checks = BatchMasks(batch, None, device), []
    for name, g in gradients:
        positions = masks.fit(g.shape, MAIN, name)
        if pool == "mean":
            g = _by_example(g, positions)
            positions = Positions.of(torch.ones(len(g), 1, dtype=torch.bool), device)
        if name not in sums:
            sums[name] = SiteSums(g.shape[-1], g.dtype, g.device, pool="token", sketch=sketch)
        checks.append(sums[name].add(g, positions))
    finite = torch.stack([c.to(device) for c in checks]).isfinite().tolist()
    if not all(finite):
        name = gradients[finite.index(False)][0]
        raise RunError("a gradient is not finite", where=name, hint="float32 instead of float16?")


def _by_example(gradients: Float[Tensor, "... d"], positions: Positions) -> Float[Tensor, "b d"]:
    """Add up the gradients of each example's real tokens, in float32 or wider."""
    rows = gradients.reshape(-1, gradients.shape[-1])
    rows = rows if positions.index is None else rows.index_select(0, positions.index)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows.new_zeros(positions.examples, rows.shape[1]).index_add_(0, sent(positions.example, rows.device), rows)


def _drawn_likelihood(logits: Tensor, mask: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """The sum of log p(y | x), y drawn, over the examples (and real next tokens) of a batch."""
    if logits.ndim == 2 and logits.shape[1] == 1:
        noise = torch.randn(logits.shape, dtype=torch.float32, generator=generator)
        return (logits.float() * noise.to(logits.device)).sum()  # the gradient of -(f - y)^2 / 2 at y = f + noise
    scores = logits.float().log_softmax(-1)
    if scores.ndim == 2:
        return scores.gather(1, draw(scores, generator)[:, None]).sum()
    real = (
        None if mask is None else mask[:, 1:].bool() & mask[:, :-1].bool()
    )  # pads foretell nothing, on whichever side
    each = scores[:, :-1].flatten(0, 1) if real is None else scores[:, :-1][real]
    return each.gather(1, draw(each, generator)[:, None]).sum()
