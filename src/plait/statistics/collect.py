"""Collecting statistics: forward passes with a hook on every site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plait.errors import InputError, UsageError
from plait.model.four_bits import said_in_four_bits
from plait.statistics.accumulate import POOLS, exact_matmul
from plait.statistics.collector import Batch, Collector
from plait.statistics.distributed import adds_over_ranks, reduce_statistics
from plait.statistics.grouped import collect_within
from plait.statistics.lazy import FileSites
from plait.statistics.moments import Statistics
from plait.statistics.passes import ForwardPasses, examples_in, first_example
from plait.statistics.sites import find_sites
from plait.statistics.targets import Target, find_targets
from plait.version import __version__

SCHEMA = 1

# Ending of a class of transformers -> PEFT's task type.
_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    target_modules: Sequence[str] | str | None = None,
    *,
    pool: str = "token",
    provenance: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    exclude_modules: Sequence[str] | str | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
    layers_pattern: Sequence[str] | str | None = None,
    sketch: int | None = None,
    memory: int | None = None,
    spool: str | Path | None = None,
    stop_early: bool = True,
    distributed: bool | None = None,
    result_device: torch.device | str = "cpu",
) -> Statistics:
    """Second moments of what the target modules read, over the real tokens of the batches.

    Modules that are called with one tensor (q, k and v; gate and up) share one site and one accumulation. The forward
    pass ends at the last wanted module, so no head is computed. LoRA layers of a PeftModel are switched off meanwhile.

    Args:
        model: A transformers model or PeftModel, on its device; FSDP or DDP wrapped, compiled, quantised, offloaded.
        batches: Mappings of tensors; names the model does not take are left out. Pads are masked by `attention_mask`
            (and `decoder_attention_mask`). Under torch.distributed: this rank's share.
        target_modules: PEFT's `target_modules`: suffixes, a regex, "all-linear"; None for the LoRA layers of a PeftModel.
        pool: "token", or "mean" for one masked mean per example.
        provenance: Recorded as it is, beside what is found here.
        device: Where batches go; by default where the model is.
        exclude_modules: PEFT's `exclude_modules`.
        layers_to_transform: PEFT's `layers_to_transform`.
        layers_pattern: PEFT's `layers_pattern`.
        sketch: Keep rank-k sketches instead of exact moments (see `FrequentDirections`).
        memory: Bytes for the sums, beside the model and its activations. The most exact form that fits is taken, and
            recorded: all layers at once, groups of layers (every batch then runs through each of them), or a sketch.
            Over ranks it is each one's, all choose alike, and none may be without batches.
        spool: With `memory`: an empty folder, each rank's own, that finished groups of layers are written to. The sites of the result
            are read from there when asked for, so the folder must live as long as the result.
        stop_early: End each forward pass at the last wanted module.
        distributed: Add over all ranks; by default where torch.distributed is initialised.
        result_device: Where the statistics end up; while they are collected and added they stay with the model.

    Returns:
        Statistics, the same on every rank.

    Raises:
        UsageError: Unknown pool, bad target_modules.
        InputError: No batches; a module that is never called; NaN or infinity, with module and batch.
        RunError: A tensor-parallel shard, a mask that fits no input.

    Cost: about 1.1 times the bare forward passes; one (d, d) float32 matrix per site.
    """
    if pool not in POOLS:
        raise UsageError(f"pool {pool!r}, expected one of {', '.join(POOLS)}")
    if sketch is not None and sketch < 1:
        raise UsageError(f"sketch {sketch}, expected at least 1")
    added = adds_over_ranks(distributed)
    if memory is not None and sketch is not None:
        raise UsageError("memory chooses the form itself", hint="leave out sketch, or give sketch alone")
    limits = {
        "exclude_modules": exclude_modules,
        "layers_to_transform": layers_to_transform,
        "layers_pattern": layers_pattern,
    }
    targets, prefix = find_targets(model, target_modules, **limits)  # type: ignore[arg-type]
    passes = ForwardPasses(model, device)
    chosen: dict[str, Any] = {}
    collected: Statistics | None
    with passes.quiet(), exact_matmul():
        if memory is not None:
            place = Path(spool) if spool is not None else None
            collected, plan = collect_within(
                memory, passes, targets, list(batches), pool=pool, spool=place, result_device=result_device, added=added
            )
            chosen, sketch = {"memory": plan.record()}, plan.sketch
        else:
            collected = _collected(passes, targets, batches, pool, sketch, stop_early)
    record = {**_facts_of(passes, prefix, pool, target_modules, sketch), **chosen, **(provenance or {})}
    if added and memory is None:
        collected = reduce_statistics(collected)
    if collected is None:
        raise InputError("no batches to collect statistics from")
    sites = collected.sites
    if not isinstance(sites, FileSites):
        sites = {s: m.to(result_device) for s, m in sites.items()}
    return Statistics(sites, collected.modules, {**record, **collected.provenance})


def _collected(
    passes: ForwardPasses,
    targets: Mapping[str, Target],
    batches: Iterable[Batch],
    pool: str,
    sketch: int | None,
    stop_early: bool,
) -> Statistics | None:
    stream, first = _peek(batches)
    if first is None:
        return None
    sites = find_sites(passes.model, targets, lambda: passes.run(first_example(first)))
    collector = Collector(targets, sites, passes, pool=pool, sketch=sketch, stop_early=stop_early)
    collector.consume(stream)
    return collector.finish()


def _peek(batches: Iterable[Batch]) -> tuple[Iterator[Batch], Batch | None]:
    stream = iter(batches)
    for first in stream:
        if examples_in(first):
            return chain([first], stream), first
    return stream, None


def _facts_of(
    passes: ForwardPasses, prefix: str, pool: str, targets: Sequence[str] | str | None, sketch: int | None
) -> Mapping[str, object]:
    config = getattr(passes.base, "config", None)
    named = targets if isinstance(targets, str) or targets is None else sorted(targets)
    return {
        "schema": SCHEMA,
        "plait": __version__,
        "base": getattr(config, "_name_or_path", "") or None,
        "backbone_prefix": prefix,
        "task_type": _task_type(passes.base),
        "target_modules": named,
        "pool": pool,
        "dtype": str(passes.dtype).removeprefix("torch."),
        "quantisation": _quantisation(passes.base, config),
        "sketch": sketch,
    }


def _task_type(model: nn.Module) -> str | None:
    """PEFT's task type of a model, by its class; None for a bare backbone and others that have none."""
    name = type(model).__name__
    return next((kind for ending, kind in _TASK_TYPES.items() if name.endswith(ending)), None)


def _quantisation(base: nn.Module, config: Any) -> str | None:
    """What a quantised base is called in the record, such as "bitsandbytes-4bit"; None for plain weights."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None and (mark := said_in_four_bits(base)):
        return mark
    if quantised is None:
        makes = {type(m).__name__ for m in base.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
        return f"bitsandbytes-{'4bit' if 'Linear4bit' in makes else '8bit'}" if makes else None
    plain = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method = getattr(plain.get("quant_method"), "value", plain.get("quant_method"))
    bits = 4 if plain.get("load_in_4bit") else 8 if plain.get("load_in_8bit") else plain.get("bits")
    return f"{method}-{bits}bit" if bits else str(method)
