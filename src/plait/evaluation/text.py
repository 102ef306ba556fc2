"""What a text model says: which of the known answers it finds likeliest, what it writes, how it is surprised."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from plait.errors import UsageError
from plait.evaluation.answer_tree import answer_tree, shared_ends, takes_trees, tree_scores
from plait.evaluation.padding import left_padded, masked_right, right_padded
from plait.model.attention import fused_attention
from plait.model.decoders import decoder_inputs
from plait.model.greedy import greedy
from plait.model.out_of_memory import by_parts
from plait.tasks.encoding import answer_length, collate, encode, length_order, to_device
from plait.tasks.metrics import MEASURED, OF_SLOTS, rouge_l
from plait.tasks.slots import slot_counts
from plait.tasks.task import IGNORED, SLOT_METRICS, Examples, Task
from plait.tasks.written import cut, same_answer

_LARGEST_LOSS = 700.0  # nats, whose exponential is still a number
WRITTEN = {"exact_match", "rouge_l", *SLOT_METRICS}  # metrics that look at what a model writes


def answers(task: Task) -> tuple[str, ...]:
    """List the answers a text task chooses from.

    Raises:
        UsageError: None are known: its answers are open.
    """
    if not task.labels:
        raise UsageError(
            "a text task is scored by its answers, and none are listed", where=f"task {task.name}", hint="give `labels`"
        )
    return task.labels


def answer_ids(task: Task, examples: Examples) -> npt.NDArray[np.int64]:
    """Say which answer is the right one, row by row.

    Raises:
        UsageError: A row's answer is not among the task's.
    """
    known = {name: i for i, name in enumerate(answers(task))}
    for row, label in enumerate(examples.labels):
        if label not in known:
            raise UsageError(
                f"answer {label!r} of row {row} is not one of {list(known)[:5]}", where=f"task {task.name}"
            )
    return np.array([known[str(label)] for label in examples.labels], np.int64)


@torch.inference_mode()
def likelihoods(
    model: Any,
    kind: str,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[Sequence[int]],
    pad: int,
    batch_size: int,
) -> npt.NDArray[np.float32]:
    """Log-likelihood of every answer, its end token included, after every prompt.

    The prompt goes through the model once, and all answers after it as one tree of tokens where the model can attend so
    (see `plait.evaluation.answer_tree`); elsewhere each answer continues from the prompt's keys and values.

    Args:
        model: A causal or sequence-to-sequence model, adapters applied.
        kind: "causal" or "seq2seq".
        prompts: Token ids of each prompt; see `choices`.
        ends: Token ids of each answer.
        pad: The id of the pad token.
        batch_size: Prompts a pass.

    Returns:
        (n, answers) natural logarithms, in the order of the prompts: as logits they make a classifier.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    scores = np.empty((len(prompts), len(ends)), np.float32)

    def one_by_one(part: Sequence[int]) -> Tensor:
        some, targets = [prompts[i] for i in part], _targets(ends, device)
        if kind == "causal":
            return _causal_scores(model, *left_padded(some, pad, device), targets)
        return _seq2seq_scores(model, *masked_right(some, pad, device), targets)

    def run(score: Callable[[Sequence[int]], Tensor]) -> None:
        def fill(part: Sequence[int]) -> None:
            scores[list(part)] = score(part).float().cpu().numpy()

        by_parts(fill, order, batch_size, "scored")

    with fused_attention(model):
        if kind == "causal" and takes_trees(model):
            tree = answer_tree(ends, device)
            with shared_ends(model) as halves:
                run(lambda part: tree_scores(halves, tree, *right_padded([prompts[i] for i in part], pad, device)))
        else:
            run(one_by_one)
    return scores


def choices(tokenizer: Any, task: Task, examples: Examples, max_length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of every row's prompt, cut so that the longest answer fits, and of every answer, end token included."""
    known = answers(task)
    longest = max(known, key=lambda a: len(tokenizer(" " + a)["input_ids"]))
    rows = encode(tokenizer, task, replace(examples, labels=(longest,) * len(examples)), max_length)
    after_first = encode(tokenizer, task, Examples(examples.texts[:1] * len(known), known), max_length)
    ends = [r["labels"][len(r["labels"]) - (_answer_length(r, task) or len(r["labels"])) :] for r in after_first]
    return prompts_of(task, rows), ends


def _targets(ends: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(map(len, ends))
    return torch.tensor([[*e, *[IGNORED] * (width - len(e))] for e in ends], dtype=torch.int64, device=device)


def _answer_length(row: dict[str, Any], task: Task) -> int:
    """Tokens of a row's inputs that belong to its last answer: none where the answer is encoded apart."""
    return answer_length(row) if task.kind == "causal" else 0


def _causal_scores(model: Any, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    (n, _), (choices, width) = ids.shape, targets.shape
    places = (mask.cumsum(1) - 1).clamp(min=0)
    prompt = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1)
    firsts: Tensor = prompt.logits[:, -1].float().log_softmax(-1)[:, targets[:, 0]]
    cache = prompt.past_key_values
    cache.batch_repeat_interleave(choices)
    answer = targets[:, :-1].clamp(min=0).repeat(n, 1)
    seen = torch.cat([mask, mask.new_ones(n, width - 1)], 1).repeat_interleave(choices, 0)
    after = places[:, -1:].repeat_interleave(choices, 0) + 1 + torch.arange(width - 1, device=ids.device)
    logits = model(input_ids=answer, attention_mask=seen, position_ids=after, past_key_values=cache).logits
    return firsts + _token_scores(logits, targets[:, 1:].repeat(n, 1)).view(n, choices)


def _seq2seq_scores(model: Any, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    n, choices = len(ids), len(targets)
    states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    repeated = (states.repeat_interleave(choices, 0),)
    labels = targets.repeat(n, 1)
    decoder = decoder_inputs(model, labels)
    wide = mask.repeat_interleave(choices, 0)
    logits = model(encoder_outputs=repeated, attention_mask=wide, decoder_input_ids=decoder, use_cache=False).logits
    return _token_scores(logits, labels).view(n, choices)


def _token_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of log-probabilities of the targets that are not ignored, a number a row."""
    losses = functional.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return -losses.sum(1)


@torch.inference_mode()
def write_texts(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, batch_size: int = 16, new_tokens: int = 32
) -> list[str]:
    """Let the model write after each prompt (token ids, see `prompts_of`), greedily (see `greedy`), up to an end token."""
    device, texts = next(model.parameters()).device, [""] * len(prompts)
    decoder_only = not model.config.is_encoder_decoder
    padded = left_padded if decoder_only else masked_right
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))

    def write(part: Sequence[int]) -> None:
        ids, mask = padded([prompts[i] for i in part], tokenizer.pad_token_id, device)
        tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens)
        new = tokens[:, ids.shape[1] :] if decoder_only else tokens
        for i, text in zip(part, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[i] = text.strip()

    with greedy(model, tokenizer):
        by_parts(write, order, batch_size, "written")
    return texts


def prompts_of(task: Task, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Token ids of each encoded row's prompt: what stands before its last answer."""
    return [r["input_ids"][: len(r["input_ids"]) - _answer_length(r, task)] for r in rows]


@torch.inference_mode()
def token_likelihoods(
    model: Any, tokenizer: Any, task: Task, rows: Sequence[dict[str, Any]], batch_size: int
) -> npt.NDArray[np.float64]:
    """Sum the log-likelihood of each encoded row's answer and count its tokens: (n, 2)."""
    sums, device = np.zeros((len(rows), 2)), next(model.parameters()).device
    order = length_order(rows)

    def scored(part: Sequence[int]) -> None:
        inputs = to_device(collate(tokenizer, [rows[i] for i in part]), device)
        labels = inputs.pop("labels")
        if task.kind == "seq2seq":
            inputs["decoder_input_ids"] = decoder_inputs(model, labels)
        logits = model(**inputs).logits
        if task.kind == "causal":
            logits, labels = logits[:, :-1], labels[:, 1:]
        counts = (labels != IGNORED).sum(1)
        sums[list(part)] = torch.stack([_token_scores(logits, labels), counts.float()], 1).double().cpu().numpy()

    by_parts(scored, order, batch_size, "scored")
    return sums


def perplexity(
    model: Any, tokenizer: Any, task: Task, examples: Examples, *, batch_size: int = 16, max_length: int = 128
) -> float:
    """Compute the exponential of the mean loss of the answers' tokens, prompts left out; 1 is certainty, 1e304 the most it says."""
    rows = encode(tokenizer, task, examples, max_length)
    total, count = token_likelihoods(model, tokenizer, task, rows, batch_size).sum(0)
    return math.exp(min(-total / max(1.0, count), _LARGEST_LOSS))


def measured_answers(
    model: Any, tokenizer: Any, task: Task, examples: Examples, *, batch_size: int, max_length: int, new_tokens: int
) -> npt.NDArray[np.float32]:
    """Measure open answers: the columns of `plait.tasks.metrics.MEASURED`, and of `OF_SLOTS` where a metric is one of slots.

    The model writes only where the task's metrics look at what it writes, at most `new_tokens` tokens (see `longest_answer`).
    """
    rows = encode(tokenizer, task, examples, max_length)
    measured = unmeasured(task, len(rows))
    measured[:, 2:4] = token_likelihoods(model, tokenizer, task, rows, batch_size)
    if set(task.metrics) & WRITTEN:
        prompts = prompts_of(task, rows)
        written = write_texts(model, tokenizer, prompts, batch_size=batch_size, new_tokens=new_tokens)
        fill_compared(measured, task, written, examples)
    return measured


def unmeasured(task: Task, rows: int) -> npt.NDArray[np.float32]:
    """Make the zeros that measurements of a task's open answers are written into."""
    width = len(MEASURED) + (len(OF_SLOTS) if set(task.metrics) & set(SLOT_METRICS) else 0)
    return np.zeros((rows, width), np.float32)


def fill_compared(measured: npt.NDArray[np.float32], task: Task, written: Sequence[str], examples: Examples) -> None:
    """Write what comparing the written answers with the right ones gives into the columns that it is of."""
    measured[:, :2] = compared(task, written, examples)
    if measured.shape[1] > len(MEASURED):
        counts = [slot_counts(w, y[0], task) for w, y in zip(written, examples.right, strict=True)]
        measured[:, len(MEASURED) :] = [(c.hits, c.both, c.intent) for c in counts]


def compared(task: Task, written: Sequence[str], examples: Examples) -> npt.NDArray[np.float32]:
    """Compare written answers with the right ones.

    Returns:
        (n, 2): whether each is a right one by the task's own comparison, and its ROUGE-L in percent; of several right
        answers the best.
    """
    pairs = zip(written, examples.right, strict=True)
    return np.array(
        [(any(same_answer(w, y, task) for y in ys), max(rouge_l(cut(w, task.stop), y) for y in ys)) for w, ys in pairs],
        np.float32,
    )


def longest_answer(tokenizer: Any, task: Task, rows: Sequence[dict[str, Any]], examples: Examples) -> int:
    """Count the tokens of the longest right answer, its end token included: as many a model may write.

    Of all of a task's rows, and not of those that are scored together: else what a row's answer counts would depend on the others.
    """
    own = max(_answer_length(r, task) or len(r["labels"]) for r in rows)
    more = [f" {text}" for texts in examples.references or () for text in texts]
    return max(
        [own, *(len(ids) + 1 for ids in (tokenizer(more, add_special_tokens=False)["input_ids"] if more else ()))]
    )
