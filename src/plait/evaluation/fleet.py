"""Scoring many adapters, merges and scales on one task in one pass over its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from plait.adapters.lora import Adapter
from plait.errors import RunError
from plait.evaluation.answer_tree import AnswerTree, answer_tree, shared_ends, takes_trees, tree_scores
from plait.evaluation.evaluate import Evaluator, Logits, is_open
from plait.evaluation.writing import Writers, endings, measured_many
from plait.model.applied import without_layers
from plait.model.attention import fused_attention
from plait.model.ends import Ends
from plait.model.rowbank import RowBank, row_bank
from plait.model.stacked import StackedFactors, by_member, stacked_factors, stacked_updates
from plait.tasks.task import TEXT_KINDS

# Tokens a pass is worth having at once; more only takes memory.
TOKENS_PER_PASS = {"cuda": 131_072, "cpu": 2_048}
# Tokens from which on a pass takes no longer a token than one with more: it ends there where the rows that follow are shorter.
ENOUGH_TOKENS = {"cuda": 131_072, "cpu": 256}
# Rows of like length in such a pass: on a CPU few, so that hardly any pads are computed; the candidates fill it.
ROWS_PER_PASS = {"cuda": 32, "cpu": 4}
MAX_TOGETHER = 64  # candidates that write together, or go through a CPU together


@dataclass(frozen=True, slots=True)
class Candidate:
    """One thing to score on a task.

    Args:
        head: The task's head.
        adapter: Alone or merged; None for the bare base.
        scale: Multiple of every delta.
    """

    head: Mapping[str, Tensor]
    adapter: Adapter | None = None
    scale: float = 1.0


def predict_many(
    evaluator: Evaluator,
    task: str,
    candidates: Sequence[Candidate],
    rows: npt.NDArray[np.int64] | None = None,
    *,
    limit: int | None = None,
) -> list[Logits]:
    """Predict as `Evaluator.predict` does for each candidate, the base's forward pass shared.

    Args:
        evaluator: The loaded base, with the task's rows.
        task: Name of a task. Text tasks are scored by their answers, listed or written; where the model's attention cannot
            follow a tree of answers (sequence-to-sequence models among others), or `likelihood` is asked for beside what is
            written, candidates go through it one after another, as they do where one changes weights that no layer
            multiplies alone.
        candidates: Any number of them; they may have different ranks and targets.
        rows: Positions of the rows; all by default.
        limit: At most so many candidates at once; by default what the device works best on. Where memory runs out they
            are split in two, and none is lost.

    Returns:
        For each candidate (n, classes), (n, 1) or (n, answers) float32, in the order of the rows.

    Raises:
        RunError: A prediction is NaN or infinite.

    Cost: one forward pass of the base on candidates x rows, without a second one for pads: a batch holds rows of like
    length, all candidates read the same rows.
    """
    model, kind = evaluator.task_model(task), evaluator.tasks[task].kind
    writes = is_open(evaluator.tasks[task])
    measured = writes and "likelihood" in evaluator.tasks[task].metrics
    one_by_one = kind in TEXT_KINDS and (kind != "causal" or measured or not takes_trees(model))
    if one_by_one or any(c.adapter and without_layers(model, c.adapter) for c in candidates):
        return [evaluator.predict(task, c.head, c.adapter, c.scale, rows) for c in candidates]
    if writes:
        return _written(evaluator, task, candidates, rows, limit or MAX_TOGETHER)
    key = (task, None if rows is None else rows.tobytes())  # rows are scored again and again
    bank, tree = evaluator.cache.banks.get(key, lambda: _bank(evaluator, task, rows))
    size = limit or _size(bank)
    predictions: list[Logits] = []

    def predict(part: Sequence[Candidate]) -> list[Logits]:
        return _predict(ends, part, _updates(evaluator, model, part), bank, tree)

    with shared_ends(model) as ends:
        for start in range(0, len(candidates), size):
            predictions += _split_where_full(predict, candidates[start : start + size])
    for candidate, logits in zip(candidates, predictions, strict=True):
        if not np.isfinite(logits).all():
            name = candidate.adapter.name if candidate.adapter else "the base"
            raise RunError(
                f"predictions of {name} hold NaN or infinity at scale {candidate.scale:g}", where=f"task {task}"
            )
    return predictions


def _written(
    evaluator: Evaluator,
    task: str,
    candidates: Sequence[Candidate],
    rows: npt.NDArray[np.int64] | None,
    size: int,
) -> list[Logits]:
    """Measure what each candidate writes, `size` of them at a time."""
    model, spec, device = evaluator.task_model(task), evaluator.tasks[task], evaluator.base.torch_device
    encoded, examples = evaluator.encoded(task), evaluator.examples[task]
    if rows is not None:
        encoded, examples = [encoded[int(i)] for i in rows], examples.take(rows)
    longest = evaluator.new_tokens(task)
    ends = evaluator.cache.endings.get(spec.stop, lambda: endings(model, evaluator.tokenizer, spec.stop, device))

    def measured(part: Sequence[Candidate]) -> list[Logits]:
        updates = _updates(evaluator, model, part)
        writers = Writers(model, evaluator.tokenizer, ends, longest, updates, len(part))
        return measured_many(writers, spec, encoded, examples)

    parts = [candidates[i : i + size] for i in range(0, len(candidates), size)]
    return [one for part in parts for one in _split_where_full(measured, part)]


def _size(bank: RowBank) -> int:
    """Candidates at once: enough that a pass of some rows of typical length fills the device."""
    device = next(iter(bank.inputs.values())).device.type
    tokens, rows = (d.get(device, d["cuda"]) for d in (TOKENS_PER_PASS, ROWS_PER_PASS))
    size = max(1, round(tokens / (rows * float(bank.lengths.mean()))))
    return min(size, MAX_TOGETHER) if device == "cpu" else size


def _bank(evaluator: Evaluator, task: str, rows: npt.NDArray[np.int64] | None) -> tuple[RowBank, AnswerTree | None]:
    """The chosen rows on the device and, for text, the tree of the answers."""
    kind, device, pad = evaluator.tasks[task].kind, evaluator.base.torch_device, evaluator.tokenizer.pad_token_id
    if kind not in TEXT_KINDS:
        encoded = evaluator.encoded(task)
        return row_bank(encoded if rows is None else [encoded[int(i)] for i in rows], pad, kind, device), None
    prompts, ends = evaluator.prompts(task)
    chosen = prompts if rows is None else [prompts[int(i)] for i in rows]
    bare = [{"input_ids": p, "attention_mask": [1] * len(p), "labels": ()} for p in chosen]
    return row_bank(bare, pad, kind, device), answer_tree(ends, device)


def _updates(evaluator: Evaluator, model: nn.Module, candidates: Sequence[Candidate]) -> Mapping[str, StackedFactors]:
    """Factors of these candidates on the device; those of the last two calls are kept, since task follows task."""
    active = [(c.adapter, c.scale) for c in candidates]
    key = tuple((id(adapter), scale) for adapter, scale in active)
    # With the adapters themselves, so that no other takes their ids.
    return evaluator.cache.stacks.get(key, lambda: (stacked_factors(model, active), active))[0]


def _split_where_full(
    predict: Callable[[Sequence[Candidate]], list[Logits]], candidates: Sequence[Candidate]
) -> list[Logits]:
    try:
        return predict(candidates)
    except torch.OutOfMemoryError:
        if len(candidates) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(candidates) // 2
    return _split_where_full(predict, candidates[:half]) + _split_where_full(predict, candidates[half:])


@torch.no_grad()
def _predict(
    ends: Ends,
    candidates: Sequence[Candidate],
    updates: Mapping[str, StackedFactors],
    bank: RowBank,
    tree: AnswerTree | None,
) -> list[Logits]:
    like = next(p for p in ends.backbone.parameters() if p.is_floating_point())
    heads = {k: torch.stack([c.head[k] for c in candidates]).to(like) for k in candidates[0].head}
    order = np.argsort(bank.lengths, kind="stable")[::-1].copy()
    places = torch.from_numpy(order).to(like.device)
    parts = []
    lengths = bank.lengths[order] + (len(tree) if tree else 0)
    with fused_attention(ends.backbone), stacked_updates(ends.backbone, updates):
        for some in _alike(lengths, len(candidates), like.device.type):
            length = int(bank.lengths[order[some.start]])
            if tree is None:
                parts.append(_pass(ends, bank, places[some], length, heads, len(candidates)))
            else:
                parts.append(_tree_pass(ends, bank, places[some], length, tree, len(candidates)))
    joined = torch.cat(parts, 1).float().cpu().numpy()
    in_order = np.empty_like(joined)
    in_order[:, order] = joined
    return list(in_order)


def _alike(lengths: npt.NDArray[np.int64], candidates: int, device: str) -> Iterator[slice]:
    """Cut rows, the longest first, into passes that fill the device and of which as little as possible is pads."""
    most, enough = (d.get(device, d["cuda"]) for d in (TOKENS_PER_PASS, ENOUGH_TOKENS))
    start = 0
    for stop in range(1, len(lengths) + 1):
        row = int(lengths[start]) * candidates
        tokens = (stop - start) * row
        more = stop < len(lengths) and tokens + row <= most
        if more and (tokens < enough or lengths[stop] == lengths[start]):
            continue
        yield slice(start, stop)
        start = stop


def _pass(
    ends: Ends, bank: RowBank, places: Tensor, length: int, heads: Mapping[str, Tensor], candidates: int
) -> Tensor:
    inputs, _ = bank.take(places, length, 1)
    stacked = {k: v.repeat(candidates, 1) for k, v in inputs.items()}
    arguments, options = ends.backbone_call(stacked)
    output = ends.backbone(*arguments, **options)
    return ends.stacked_logits(output, stacked, heads)


def _tree_pass(ends: Ends, bank: RowBank, places: Tensor, length: int, tree: AnswerTree, candidates: int) -> Tensor:
    inputs, _ = bank.take(places, length, 1)
    ids, lengths = inputs["input_ids"].repeat(candidates, 1), inputs["attention_mask"].sum(1).repeat(candidates)
    return by_member(tree_scores(ends, tree, ids, lengths), candidates)
