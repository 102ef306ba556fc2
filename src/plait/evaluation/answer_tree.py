"""All answers of a text task scored in one pass: they follow the prompt as one tree, shared beginnings once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.model.base import backbone_of
from plait.model.ends import Ends

# Decoders that take a mask of two dimensions a row and positions as they are given; each is tested on a tiny model.
TREE_MODELS = ("gemma", "gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
MAX_LOGITS = {"cuda": 1 << 28, "cpu": 1 << 24}  # numbers of (rows, nodes, vocabulary) held at once, in float32


@dataclass(frozen=True, slots=True)
class AnswerTree:
    """The token sequences of all answers, merged where they begin alike.

    A *place* is the prompt's end (0) or a node (from 1): somewhere a next token is predicted. Only such tokens are fed
    to the model; the last token of an answer is predicted, never fed.

    Args:
        tokens: (nodes,) fed tokens, parents before children.
        depth: (nodes,) tokens after the prompt, from 1.
        sees: (nodes, nodes) whether a node sees another: itself and what it follows.
        edge_from: (edges,) the place at which each token is predicted.
        edge_token: (edges,) that token.
        paths: (answers, longest) edges of each answer, filled up with the number of edges.
    """

    tokens: Tensor
    depth: Tensor
    sees: Tensor
    edge_from: Tensor
    edge_token: Tensor
    paths: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def answer_tree(answers: Sequence[Sequence[int]], device: torch.device) -> AnswerTree:
    """Merge answers, each a sequence of at least one token, into a tree."""
    edges: dict[tuple[int, int], int] = {}
    nodes: dict[tuple[int, int], int] = {}
    seen: list[set[int]] = []
    paths = []
    for answer in answers:
        place, path, above = 0, [], set[int]()
        for i, token in enumerate(answer):
            path.append(edges.setdefault((place, token), len(edges)))
            if i + 1 == len(answer):
                break
            if (place, token) not in nodes:
                nodes[place, token] = len(nodes) + 1
                seen.append({*above, len(nodes) - 1})
            place = nodes[place, token]
            above = seen[place - 1]
        paths.append(path)
    width = max(map(len, paths))
    filled = [[*p, *[len(edges)] * (width - len(p))] for p in paths]
    sees = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
    for i, visible in enumerate(seen):
        sees[i, sorted(visible)] = True
    columns = [[t for _, t in nodes], [len(v) for v in seen], [p for p, _ in edges], [t for _, t in edges], filled]
    tokens, depth, edge_from, edge_token, steps = (torch.tensor(x, dtype=torch.long, device=device) for x in columns)
    return AnswerTree(tokens, depth, sees.to(device), edge_from, edge_token, steps)


def takes_trees(model: Any) -> bool:
    """Whether a model's attention can follow a tree; others continue every answer from the prompt's keys and values."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        config.model_type in TREE_MODELS
        and kinds == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and getattr(config, "_attn_implementation", "sdpa") in ("sdpa", "eager")
        and bool(backbone_of(model)[1])
    )


@contextlib.contextmanager
def shared_ends(model: Any) -> Iterator[Ends]:
    """Open the ends of a task's model, made on a shallow copy: the model itself keeps its backbone."""
    view = copy.copy(model)
    view._modules = dict(model._modules)
    yield Ends(view)


def tree_scores(ends: Ends, tree: AnswerTree, ids: Tensor, lengths: Tensor) -> Tensor:
    """Log-likelihood of every answer after every prompt, in one pass.

    Args:
        ends: Ends of a causal model; see `shared_ends`.
        tree: The answers, on the model's device.
        ids: (n, length) prompts, padded on the right.
        lengths: (n,) tokens of each.

    Returns:
        (n, answers) natural logarithms, float32.

    Cost: one forward pass over n x (length + nodes) tokens; the output layer runs where an answer goes on, only.
    """
    (n, length), device = ids.shape, ids.device
    dtype = next(p for p in ends.backbone.parameters() if p.is_floating_point()).dtype
    positions = torch.cat([torch.arange(length, device=device).expand(n, -1), lengths[:, None] - 1 + tree.depth], 1)
    inputs = {
        "input_ids": torch.cat([ids, tree.tokens.expand(n, -1)], 1),
        "attention_mask": _mask(tree, lengths, length, dtype),
        "position_ids": positions,
    }
    arguments, options = ends.backbone_call(inputs)
    output = ends.backbone(*arguments, **options)
    nodes = torch.arange(length, length + len(tree), device=device).expand(n, -1)
    places = torch.cat([lengths[:, None] - 1, nodes], 1)
    states = output.last_hidden_state
    picked = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
    config: Any = ends.backbone.config
    vocabulary = int(config.vocab_size)
    rows = max(1, MAX_LOGITS.get(device.type, MAX_LOGITS["cuda"]) // (vocabulary * picked.shape[1]))
    parts = []
    for start in range(0, n, rows):
        part = picked[start : start + rows]
        logits = ends.logits(type(output)(last_hidden_state=part), {"input_ids": inputs["input_ids"][:1]})
        chosen = logits[:, tree.edge_from, tree.edge_token].float()
        parts.append(chosen - logits.float().logsumexp(-1)[:, tree.edge_from])
    edges = torch.cat(parts)
    return torch.cat([edges, edges.new_zeros(n, 1)], 1)[:, tree.paths].sum(-1)


def _mask(tree: AnswerTree, lengths: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(n, 1, length + nodes, length + nodes), 0 where a token sees another.

    A pad sees the prompt before it, so that no row of the softmax is empty; nobody sees a pad.
    """
    n, nodes = len(lengths), len(tree)
    real = torch.arange(length, device=lengths.device) < lengths[:, None]
    visible = torch.zeros(n, length + nodes, length + nodes, dtype=torch.bool, device=lengths.device)
    causal = torch.ones(length, length, dtype=torch.bool, device=lengths.device).tril()
    visible[:, :length, :length] = causal & real[:, None]
    visible[:, length:, :length] = real[:, None]
    visible[:, length:, length:] = tree.sees
    mask = torch.zeros(visible.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
