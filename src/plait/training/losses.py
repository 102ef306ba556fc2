"""The loss of a task, the same for one model and for a fleet."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from plait.tasks.task import IGNORED


def task_loss(kind: str, logits: Tensor, labels: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Mean loss of a batch.

    Args:
        kind: The task's: cross entropy for "classification", squared error for "regression", cross entropy of the
            next token for "causal" and of the target's tokens for "seq2seq"; tokens labelled -100 do not count.
        logits: (n, classes), or (n, length, vocabulary) for text.
        labels: (n,), or (n, length).
        items: What the sum is divided by, where the batch is a part of a larger one; the number of its rows or
            labelled tokens by default.
    """
    if kind == "regression":
        loss = functional.mse_loss(logits.float().reshape(-1), labels.float().reshape(-1), reduction="sum")
        return loss / (labels.numel() if items is None else items)
    if kind == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat, targets = logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1)
    loss = functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")
    return loss / ((targets != IGNORED).sum().clamp(min=1) if items is None else items)


def member_sums(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses of each of several stacked batches.

    Args:
        kind: The task's, as in `task_loss`; for text, logits already stand beside the token they predict.
        logits: (members, n, classes), or (members, n, length, vocabulary).
        labels: (members, n), or (members, n, length).

    Returns:
        (members,); divided by the number of rows or labelled tokens of the step it is `task_loss`.
    """
    members = logits.shape[0]
    if kind == "regression":
        return (logits.float().reshape(members, -1) - labels.float().reshape(members, -1)).square().sum(1)
    flat, targets = logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1).long()
    losses = functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="none")
    return losses.view(members, -1).sum(1)
