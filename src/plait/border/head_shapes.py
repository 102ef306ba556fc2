"""Which weight of a classifier's head is its last layer, by names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# What transformers calls the last layer of a head, the commonest first; RoBERTa's `classifier.out_proj` comes after its
# `classifier.dense`, DistilBERT's `classifier` after its `pre_classifier`.
_OUTPUTS = ("out_proj", "classifier", "score", "qa_outputs", "logits_proj", "fc2", "output", "proj")


def output_layer(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Name the weight of a head's last layer; None where several could be it.

    >>> output_layer(
    ...     {"classifier.dense.weight": (8, 8), "classifier.out_proj.weight": (3, 8), "classifier.out_proj.bias": (3,)}
    ... )
    'classifier.out_proj.weight'

    Args:
        shapes: Name of each tensor of the head -> its shape.
    """
    weights = [k for k, shape in shapes.items() if len(shape) == 2 and k.endswith(".weight")]
    if len(weights) == 1:
        return weights[0]
    for last in _OUTPUTS:
        named = [k for k in weights if k.removesuffix(".weight").rpartition(".")[2] == last]
        if len(named) == 1:
            return named[0]
    return None
