"""Embeddings and output layers that were trained beside the factors, as plain LoRA: rows, whole weights, PEFT's copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plait.adapters.beside import EMBEDDING_NAMES, OUTPUT_NAMES, undeclared
from plait.adapters.lora import EMBEDDING, LINEAR, Adapter, LoraFactors
from plait.border.counts import plural
from plait.border.module_names import named_by
from plait.errors import InputError
from plait.formats.base_weights import BaseWeights
from plait.formats.lowrank import Cut, best_rank
from plait.formats.work import Step, Work, require_base, step_of, taken
from plait.model.stored_names import compared_copies

_TOKENS = ".token_adapter.trainable_tokens_delta"


def take_tokens(work: Work) -> None:
    """Take trained rows out of the tensors, and their indices out of the config.

    Raises:
        InputError: One without the other, or indices that are not those of the rows.
    """
    found = taken(work, (_TOKENS,))
    work.taken["tokens"] = found
    indices = work.raw.get("trainable_token_indices")
    if bool(found) != bool(indices):
        has = f"the file has trained rows of {next(iter(found))!r}" if found else "the file has no trained rows"
        says = "names rows" if indices else "names none"
        raise InputError(f"trainable_token_indices {says}, and {has}", where=str(work.folder))
    if found:
        work.taken["indices"] = {m: _indices(indices, m, len(rows), work) for m, rows in found.items()}
        work.raw["trainable_token_indices"] = None


def _indices(given: Any, module: str, count: int, work: Work) -> Tensor:
    """The rows of one embedding; a list means the input embedding, an object names its modules."""
    if isinstance(given, dict):
        given = next((v for k, v in given.items() if named_by(module, k)), None)
    known = isinstance(given, list) and all(isinstance(i, int) and i >= 0 for i in given)
    if not known or not len(given) == len(set(given)) == count:
        raise InputError(
            f"trainable_token_indices do not name the {plural(count, 'row')} of {module!r}", where=str(work.folder)
        )
    return torch.tensor(given, dtype=torch.int64)


def is_embedding(module: str) -> bool:
    """Whether a module of rows, one per token, is an embedding; if not, it is a linear layer with an output per token.

    Both store (tokens, width), so that only the name tells them apart.
    """
    last = module.rpartition(".")[2]
    return last not in OUTPUT_NAMES and (last in EMBEDDING_NAMES or "emb" in last)


def without_tokens(work: Work, adapter: Adapter, base: BaseWeights | None) -> Adapter:
    """Rows that replace an embedding's or an output layer's: one rank per row holds their difference to the base's exactly."""
    modules = dict(adapter.modules)
    given = {module.rpartition(".")[2] for module in work.taken["tokens"]}
    cut = len(adapter.prefix) + 1 if adapter.prefix else 0
    for module, rows in work.taken["tokens"].items():
        base = require_base(base, "trainable_token_indices", work)
        inside, indices = module[cut:], work.taken["indices"][module]
        stored = base.stored(inside)
        if (
            rows.ndim != 2
            or stored.shape[1] != rows.shape[1]
            or int(indices.max()) >= stored.shape[0]
            or inside in modules
        ):
            raise InputError(f"the trained rows of {module!r} do not fit the base", where=str(work.folder))
        before = torch.cat([stored.read(int(i), int(i) + 1) for i in indices])
        one_hot = torch.zeros(len(indices), stored.shape[0], dtype=torch.float32)
        one_hot[torch.arange(len(indices)), indices] = 1.0
        change = rows.float() - before.float()
        by_input = LoraFactors(one_hot, change.T.contiguous(), 1.0, EMBEDDING)
        by_output = LoraFactors(change, one_hot.T.contiguous(), 1.0, LINEAR)
        modules[inside] = by_input if is_embedding(inside) else by_output
        output = base.output_of(module) if is_embedding(inside) else None  # PEFT ties the trained rows as well
        if output and output.rpartition(".")[2] not in given:
            if output in modules:
                raise InputError(
                    f"{output!r} has factors, and by its tie to {module!r} trained rows as well", where=str(work.folder)
                )
            modules[output] = by_output
        work.steps.append(
            Step(f"{plural(len(indices), 'trained token')} of {inside} as rank {len(indices)}", exact=True)
        )
    return replace(adapter, modules=dict(sorted(modules.items())), target_modules=_targets(adapter, modules))


def without_whole(work: Work, adapter: Adapter, base: BaseWeights | None) -> Adapter:
    """Weights that were trained whole as their difference to the base's, at the best rank.

    Where the base ties its output to its embedding and only the embedding was trained whole, what that does to the output
    depends on the config: a weight in modules_to_save is kept apart from the tie, any other takes the base's place in both.
    """
    if not adapter.extras:
        return adapter
    base = require_base(base, f"{next(iter(adapter.extras))!r}, trained whole,", work)
    modules, cuts = dict(adapter.modules), {}
    cut = len(adapter.prefix) + 1 if adapter.prefix else 0
    for key, tensor in adapter.extras.items():
        module = key.removesuffix(".weight")[cut:]
        if tensor.ndim != 2 or not key.endswith(".weight") or module in modules:
            raise InputError(
                f"{key!r} was trained whole and is no weight of a linear or embedding module",
                where=str(work.folder),
                hint="no low-rank update holds it: a sum at a weight of 1 carries it, or PEFT's merge_and_unload puts it into a model",
            )
        embedding = is_embedding(module)
        shape = (tensor.shape[1], tensor.shape[0]) if embedding else (tensor.shape[0], tensor.shape[1])
        W = base.matrix(module, shape, embedding=embedding)
        change = (tensor.T if embedding else tensor).float() - W
        if bool(change.any()):
            cuts[module] = best_rank(change, work.means.rank or adapter.rank, EMBEDDING if embedding else LINEAR)
        else:
            work.steps.append(Step(f"{module} equals the base's and is left out", exact=True))
    if cuts:
        work.steps.append(step_of(f"{', '.join(cuts)}, trained whole, at the best rank", cuts))
    modules |= {m: c.factors for m, c in cuts.items()}
    _tie(adapter, base, modules, cuts)
    return replace(
        adapter,
        modules=dict(sorted(modules.items())),
        extras={},
        modules_to_save=(),
        target_modules=_targets(adapter, modules),
    )


def _tie(adapter: Adapter, base: BaseWeights, modules: dict[str, LoraFactors], cuts: Mapping[str, Cut]) -> None:
    """Give the tied output layer the update of an embedding that takes the base's place."""
    replaced = [k.removesuffix(".weight") for k in undeclared(adapter.extras, adapter.modules_to_save)]
    for module in [m for m in replaced if m in cuts and is_embedding(m)]:
        output = base.output_of(adapter.full_name(module))
        if output is None or any(m.rpartition(".")[2] == output.rpartition(".")[2] for m in modules):
            continue  # untied, or it has an update of its own
        f = cuts[module].factors
        modules[output] = LoraFactors(f.B.T.contiguous(), f.A.T.contiguous(), f.scaling, LINEAR)


def without_copies(work: Work, adapter: Adapter, base: BaseWeights | None) -> Adapter:
    """PEFT's copies of base weights held against the base's and left out; without a base they stay where they are."""
    if base is None or not adapter.copies:
        return adapter
    lines = compared_copies(adapter.copies, adapter, base.tensors, base.tied)
    work.steps += [Step(f"{line}; left out", exact=True) for line in lines]
    return replace(adapter, copies={})


def _targets(adapter: Adapter, modules: Mapping[str, LoraFactors]) -> tuple[str, ...] | str | None:
    return adapter.target_modules if modules.keys() == adapter.modules.keys() else None
