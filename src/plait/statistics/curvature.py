"""How much what a base predicts moves with each module's outputs: second moments of gradients, one matrix a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.errors import RunError, UsageError
from plait.statistics.fisher import draw, recording, submodule


def collect_curvature(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    modules: Sequence[str],
    *,
    redraw: Callable[[int], None] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Float[Tensor, "out out"]]:
    """Sum g g^T over tokens, g the gradient at a module's output of log p(y | x), y drawn from the model itself.

    It is the output side of the Kronecker-factored Fisher information: with the inputs' second moment M beside it, an update
    D of the module moves what the model predicts by about tr(G D M D^T) / 2 nats.

    Args:
        model: Called as ``model(**batch).logits``: (n, classes), (n, 1) of a regression, whose y is drawn with unit variance,
            or (n, tokens, vocabulary) of a language model, which draws every next token. Left in its mode.
        batches: ``input_ids``, ``attention_mask``; labels are not looked at.
        modules: Names relative to the backbone.
        redraw: Called with the number of each batch before it, to draw a head anew where the base has none: what several
            heads that nobody has trained ask of the outputs stands for what any head may ask.
        generator: Draws y, on the CPU.

    Returns:
        Module -> G, float32 on the CPU.

    Raises:
        UsageError: A module that is not in the model, or no batches.
        RunError: A gradient that is not finite.

    Cost:
        One forward and one backward pass, and out^2 multiplications a token and module.

    Source: Martens and Grosse, K-FAC, arXiv 1503.05671. As a penalty beside M: TAK, arXiv 2602.17385; DELTA, arXiv 2605.18993.
    """
    layers = {name: submodule(model, name) for name in modules}
    sums: dict[str, Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        for number, batch in enumerate(batches):
            if redraw is not None:
                redraw(number)
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            with recording(layers) as seen, torch.enable_grad():
                drawn = _drawn_likelihood(model(**inputs).logits, batch["attention_mask"], generator)
                gradients = torch.autograd.grad(drawn, [seen[name][1] for name in layers])
            for name, gradient in zip(layers, gradients, strict=True):
                g = gradient.float().reshape(-1, gradient.shape[-1])
                sums[name] = sums[name].addmm_(g.T, g) if name in sums else g.T @ g
    finally:
        model.train(was_training)
    if not sums:
        raise UsageError("no batches to collect curvature from")
    for name, G in sums.items():
        if not bool(torch.isfinite(G).all()):
            raise RunError("a gradient is not finite", where=name, hint="float32 instead of float16?")
    return {name: G.cpu() for name, G in sums.items()}


def _drawn_likelihood(logits: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
    """The sum of log p(y | x), y drawn, over the examples (and real next tokens) of a batch."""
    if logits.ndim == 2 and logits.shape[1] == 1:
        noise = torch.randn(logits.shape, dtype=torch.float32, generator=generator)
        return (logits.float() * noise.to(logits.device)).sum()  # the gradient of -(f - y)^2 / 2 at y = f + noise
    scores = logits.float().log_softmax(-1)
    if scores.ndim == 2:
        return scores.gather(1, draw(scores, generator)[:, None]).sum()
    real = mask[:, 1:].bool()
    each = scores[:, :-1][real]
    return each.gather(1, draw(each, generator)[:, None]).sum()
