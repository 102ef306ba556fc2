"""What many candidates write after the same prompts: one greedy decoding for all of them, the base's passes shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plait.errors import RunError
from plait.evaluation.padding import left_padded
from plait.evaluation.text import WRITTEN, fill_compared, prompts_of, unmeasured
from plait.model.attention import fused_attention
from plait.model.base import backbone_of
from plait.model.devices import free_memory
from plait.model.greedy import end_tokens
from plait.model.stacked import StackedFactors, by_member, stacked_updates
from plait.tasks.task import Examples, Task

# Tokens whose keys and values are held at once: with more, a step takes longer in proportion.
TOKENS_HELD = {"cuda": 500_000, "cpu": 16_384}
TOKENS_READ = {"cuda": 65_536, "cpu": 4_096}  # tokens of prompts read at once
MEMORY_SHARE = 0.3  # of the free memory that keys and values may take: attention spreads them out over the heads
LOOK_EVERY = 8  # steps between looks at who has ended: each makes the host wait for the device
NO_TOKEN = -1  # in place of a token that the logits do not tell
WORTH_GATHERING = 0.75  # rows are gathered anew where no more than this share still writes


@dataclass(frozen=True, slots=True)
class Endings:
    """Which tokens end an answer.

    Args:
        always: (vocabulary,) end tokens, and those that hold a stop string after something that is no blank.
        after_text: (vocabulary,) those that hold a stop string; they end an answer that has begun.
        blank: (vocabulary,) those with which no answer begins.
    """

    always: Tensor
    after_text: Tensor
    blank: Tensor


def endings(model: Any, tokenizer: Any, stop: str | None, device: torch.device) -> Endings:
    """Find the tokens that end an answer: the tokenizer's and the model's end tokens, and those that hold the stop string.

    A stop string of several tokens ends nothing early: what follows it is cut off afterwards all the same.
    """
    size = int(model.config.vocab_size)
    flags = torch.zeros(3, size, dtype=torch.bool)
    flags[0, end_tokens(model, tokenizer)] = True
    if stop is not None:
        pieces = tokenizer.batch_decode([[i] for i in range(min(size, len(tokenizer)))])
        for i, piece in enumerate(pieces):
            flags[0, i] |= stop in piece.lstrip()
            flags[1, i] = stop in piece
            flags[2, i] = not piece.strip()
    always, after, blank = flags.to(device)
    return Endings(always, after, blank)


@dataclass(frozen=True, slots=True)
class Writers:
    """Candidates that write side by side on one model, after the same prompts.

    Args:
        model: A causal model, in evaluation mode.
        tokenizer: Its tokenizer.
        ends: Which tokens end an answer, see `endings`.
        new_tokens: Tokens that are written at most.
        updates: Module of the backbone -> factors of all candidates; {} for the model as it is.
        members: How many candidates there are.
        draws: Where tokens are drawn from, on the model's device; None takes the likeliest.
    """

    model: Any
    tokenizer: Any
    ends: Endings
    new_tokens: int
    updates: Mapping[str, StackedFactors] = field(default_factory=dict)
    members: int = 1
    draws: torch.Generator | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device


def measured_many(
    writers: Writers, task: Task, rows: Sequence[dict[str, Any]], examples: Examples
) -> list[npt.NDArray[np.float32]]:
    """Measure what every candidate writes: as `plait.evaluation.text.measured_answers`, without likelihoods.

    Args:
        writers: Who writes, at most `plait.evaluation.text.longest_answer` tokens.
        task: Whose answers are open.
        rows: Encoded examples.
        examples: The same, with their right answers.
    """
    found = [unmeasured(task, len(rows)) for _ in range(writers.members)]
    if set(task.metrics) & WRITTEN:
        written = write_many(writers, prompts_of(task, rows))
        for one, texts in zip(found, written, strict=True):
            fill_compared(one, task, texts, examples)
    return found


def write_many(writers: Writers, prompts: Sequence[Sequence[int]]) -> list[list[str]]:
    """Write after each prompt with each candidate: the texts that `write_ids` gives, without special tokens."""
    written = write_ids(writers, prompts)
    texts = writers.tokenizer.batch_decode([ids for own in written for ids in own], skip_special_tokens=True)
    n = len(prompts)
    return [[text.strip() for text in texts[k * n : (k + 1) * n]] for k in range(writers.members)]


@torch.inference_mode()
def write_ids(writers: Writers, prompts: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Write after each prompt with each candidate, up to an end or `new_tokens`.

    Args:
        writers: Who writes.
        prompts: Token ids of each.

    Returns:
        For each candidate the tokens it wrote, its end token included, in the order of the prompts.

    Raises:
        RunError: Logits are NaN or infinite.

    Cost: a pass over members x prompts, then one step a token; rows that have ended leave the batch, as long as every
    candidate has equally many left. Keys and values are held for the rows of a part of the prompts.
    """
    members = writers.members
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    written: list[list[list[int]]] = [[[]] * len(prompts) for _ in range(members)]
    start, room = 0, _room(writers.model, writers.device)
    while start < len(order):
        length = len(prompts[order[start]]) + writers.new_tokens
        part = order[start : start + max(1, room // (members * length))]
        tokens, lengths = _decoded(writers, [prompts[i] for i in part])
        rows = zip(tokens.tolist(), lengths.tolist(), strict=True)
        for k, (row, length) in enumerate(rows):
            written[k // len(part)][part[k % len(part)]] = row[:length]
        start += len(part)
    return written


def _room(model: Any, device: torch.device) -> int:
    """Tokens whose keys and values may be held at once."""
    wanted = TOKENS_HELD.get(device.type, TOKENS_HELD["cuda"])
    if device.type != "cuda":
        return wanted
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * width * next(model.parameters()).element_size()
    return min(wanted, int(MEMORY_SHARE * free_memory(device) / size))


@dataclass(slots=True)
class _Batch:
    """Rows that are being written, flattened: candidate by candidate the same prompts.

    Args:
        places: (rows,) where each stands in the result.
        token: (rows,) the token that comes next.
        mask: (rows, length) 1 at what is read so far, 0 at pads.
        position: (rows, 1) position of the next token.
        ended, begun: (rows,) whether an answer is over, and whether it holds more than blanks.
        cache: Keys and values of what is read so far.
    """

    places: Tensor
    token: Tensor
    mask: Tensor
    position: Tensor
    ended: Tensor
    begun: Tensor
    cache: Any

    @classmethod
    def of(cls, writers: Writers, ids: Tensor, mask: Tensor) -> _Batch:
        """Read the prompts, (n, length)."""
        token, cache = _read(writers, ids, mask)
        mask = mask.repeat(writers.members, 1)
        none = torch.zeros(len(mask), dtype=torch.bool, device=ids.device)
        places = torch.arange(len(mask), device=ids.device)
        return cls(places, token, mask, mask.sum(1, keepdim=True), none, none.clone(), cache)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.cache.batch_select_indices(rows)
        for name in ("places", "token", "mask", "position", "ended", "begun"):
            setattr(self, name, getattr(self, name)[rows])

    def advance(self, writers: Writers) -> None:
        """Read the tokens that were written, and find those that come next."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        output = writers.model(
            input_ids=self.token[:, None], attention_mask=self.mask, position_ids=self.position,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.token, self.position = _next(output.logits, writers.draws), self.position + 1


def _decoded(writers: Writers, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(members * prompts, new_tokens) token ids, pads after the end of each; and (members * prompts,) how many were written.

    Raises:
        RunError: Logits are NaN or infinite.
    """
    pad, device, ends, steps = writers.tokenizer.pad_token_id, writers.device, writers.ends, writers.new_tokens
    ids, mask = left_padded(prompts, pad, device)
    found = torch.full((writers.members * len(ids), steps), pad, dtype=torch.long, device=device)
    lengths = torch.zeros(len(found), dtype=torch.long, device=device)
    lost = torch.zeros((), dtype=torch.bool, device=device)
    with fused_attention(writers.model), stacked_updates(backbone_of(writers.model)[0], writers.updates):
        batch = _Batch.of(writers, ids, mask)
        for step in range(steps):
            lost |= (batch.token == NO_TOKEN).any()
            token = batch.token = batch.token.clamp(min=0)
            found[batch.places, step] = torch.where(batch.ended, pad, token)
            lengths[batch.places] += ~batch.ended
            batch.ended |= ends.always[token] | (batch.begun & ends.after_text[token])
            batch.begun |= ~ends.blank[token]
            if step + 1 == steps:
                break
            if (step + 1) % LOOK_EVERY == 0:
                rows = _still_writing(batch.ended.view(writers.members, -1))
                if len(rows) == 0:
                    break
                if len(rows) < len(batch.ended):
                    batch.keep(rows)
            batch.advance(writers)
    if bool(lost):
        raise RunError("what is written holds NaN or infinity", hint="lower the scale, or look for NaN in the adapters")
    return found, lengths


def _read(writers: Writers, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    """The first token after each prompt, (members * n,), and keys and values of all prompts.

    A few prompts at a time: what a pass holds beside keys and values is many times larger than they are.
    """
    from transformers import DynamicCache

    model, members = writers.model, writers.members
    size = max(1, TOKENS_READ.get(ids.device.type, TOKENS_READ["cuda"]) // (members * ids.shape[1]))
    firsts, parts = [], []
    for start in range(0, len(ids), size):
        some, seen = ids[start : start + size], mask[start : start + size].repeat(members, 1)
        part = DynamicCache(config=model.config)
        output = model(
            input_ids=some.repeat(members, 1), attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0),
            past_key_values=part, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        firsts.append(_next(output.logits, writers.draws).view(members, -1))
        parts.append(part)
    if len(parts) > 1:
        for layers in zip(*(p.layers for p in parts), strict=True):
            for name in ("keys", "values"):
                joined = torch.cat([by_member(getattr(x, name), members) for x in layers], 1).flatten(0, 1)
                for x in layers:
                    setattr(x, name, joined)
    return torch.cat(firsts, 1).reshape(-1), parts[0]


def _next(logits: Tensor, draws: torch.Generator | None) -> Tensor:
    """The likeliest next token of every row, or one that is drawn; `NO_TOKEN` where the logits hold NaN or are infinite."""
    values, tokens = logits[:, -1].max(-1)
    if draws is not None:  # the largest of all logits, each with Gumbel's noise added, is a draw from their softmax
        noise = torch.empty_like(logits[:, -1], dtype=torch.float32).exponential_(generator=draws)
        tokens = (logits[:, -1].float() - noise.log()).argmax(-1)
    return torch.where(values.isfinite(), tokens, NO_TOKEN)


def _still_writing(ended: Tensor) -> Tensor:
    """Which of (members, rows) to go on with, as positions in the flattened batch: equally many of each member.

    All, where few have ended; none, where all have. Ended rows make up the number where a member has fewer that still write.
    """
    members, now = ended.shape
    most = int((~ended).sum(1).max())
    if most == 0 or most > WORTH_GATHERING * now:
        most = now if most else 0
    rows = (~ended).int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return (rows + now * torch.arange(members, device=ended.device)[:, None]).reshape(-1)
