"""PEFT variants turned into plain LoRA: exactly where that is possible, else at the best rank with the error stated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from plait.adapters.beside import require_filled
from plait.adapters.config import CONFIG, checked_config, read_raw_config
from plait.adapters.key_names import without_adapter_name
from plait.adapters.lora import EMBEDDING, Adapter, concatenated
from plait.adapters.peft_format import adapter_of
from plait.adapters.peft_tensors import require_sides
from plait.adapters.tensors import widened
from plait.adapters.unread import unread_lines
from plait.adapters.weights import read_weights
from plait.border.counts import plural
from plait.errors import InputError
from plait.formats.base_weights import BaseWeights
from plait.formats.lowrank import Cut, best_rank
from plait.formats.whole import take_tokens, without_copies, without_tokens, without_whole
from plait.formats.work import Means, Step, Work, require_base, step_of, taken

_MAGNITUDE = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_BIAS = ".lora_B.bias"
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "mica")


@dataclass(frozen=True, slots=True)
class Plain:
    """An adapter that was turned into plain LoRA.

    Args:
        adapter: It.
        steps: What was done.
        unread: Factors of its file that PEFT would pass over by its config, a line each.
    """

    adapter: Adapter
    steps: tuple[Step, ...]
    unread: tuple[str, ...]


def read_plain(folder: Path, means: Means, *, name: str | None = None) -> Plain:
    """Read a PEFT folder of a plain or convertible variant as a plain LoRA.

    Raises:
        InputError: A variant that cannot be converted, or lacks what its conversion needs; says which.
    """
    raw = read_raw_config(folder)
    tensors, metadata, digests = read_weights(folder, lambda shapes: require_sides(shapes, folder))
    require_filled(tensors, str(folder))
    plain = without_adapter_name({k: widened(t) for k, t in tensors.items()}, str(folder))
    work = Work(folder, raw, plain, means)
    _take_magnitudes(work)
    _take_biases(work)
    take_tokens(work)
    started = _take_start(work)
    config = checked_config(work.raw, folder / CONFIG)
    if config.rslora:
        work.steps.append(Step("rsLoRA: alpha / sqrt(rank) written as alpha / rank", exact=True))
    adapter = adapter_of(folder, config, work.tensors, metadata, digests, name=name)
    unread = tuple(unread_lines([adapter]))  # before modules are added that its config knows by other keys
    if started:
        adapter = _minus_start(work, adapter)
    needed = bool(work.taken.get("magnitudes") or work.taken.get("tokens") or adapter.extras or adapter.copies)
    base = BaseWeights(means.base, adapter) if needed and means.base else None
    adapter = without_copies(work, _without_magnitudes(work, adapter, base), base)
    adapter = without_tokens(work, adapter, base)
    return Plain(without_whole(work, adapter, base), tuple(work.steps), unread)


# --- DoRA -------------------------------------------------------------------------------------------------------------


def _take_magnitudes(work: Work) -> None:
    found = taken(work, _MAGNITUDE)
    if bool(found) != bool(work.raw.get("use_dora")):
        has = f"holds magnitudes ({next(iter(found))!r})" if found else "holds no magnitudes"
        set_ = "is set" if work.raw.get("use_dora") else "is not set"
        raise InputError(f"use_dora {set_}, and the file {has}", where=str(work.folder))
    work.raw["use_dora"], work.taken["magnitudes"] = False, found


def _without_magnitudes(work: Work, adapter: Adapter, base: BaseWeights | None) -> Adapter:
    """DoRA's delta m / |W0 + s B A| * (W0 + s B A) - W0, norms over each output's row, at the best rank.

    Source: PEFT's merge of DoRA layers; Liu et al., arXiv:2402.09353, equation 5.
    """
    magnitudes = work.taken["magnitudes"]
    if not magnitudes:
        return adapter
    base = require_base(base, "DoRA", work)
    cuts: dict[str, Cut] = {}
    for module, f in adapter.modules.items():
        magnitude = magnitudes.pop(adapter.full_name(module), None)
        if magnitude is None or f.kind == EMBEDDING:
            reason = "has no magnitude vector" if magnitude is None else "is an embedding under DoRA"
            raise InputError(f"module {module!r} {reason}", where=str(work.folder))
        W = base.matrix(module, f.shape).double()
        changed = W + f.delta(torch.float64)
        if magnitude.numel() != f.shape[0] or not bool(torch.isfinite(magnitude).all()):
            raise InputError(
                f"the magnitudes of {module!r} are not {plural(f.shape[0], 'finite number')}", where=str(work.folder)
            )
        gain = magnitude.double().reshape(-1) / changed.norm(dim=1)
        cuts[module] = best_rank(gain[:, None] * changed - W, work.means.rank or f.rank, f.kind)
    if magnitudes:
        raise InputError(f"{next(iter(magnitudes))!r} has magnitudes and no factors", where=str(work.folder))
    work.steps.append(step_of("DoRA at the best rank", cuts))
    return replace(adapter, modules={m: c.factors for m, c in cuts.items()})


# --- lora_bias --------------------------------------------------------------------------------------------------------


def _take_biases(work: Work) -> None:
    """A bias of B shifts outputs whatever the input is: no LoRA does. Left out only where it is zero, or on demand."""
    found = taken(work, (_BIAS,))
    if not found and not work.raw.get("lora_bias"):
        return
    size = sum(float(b.double().square().sum()) for b in found.values()) ** 0.5
    if size > 0 and not work.means.drop_bias:
        raise InputError(
            f"lora_bias: its biases (norm {size:.3g}) shift outputs whatever the input is, which no LoRA does",
            where=str(work.folder),
            hint="--drop-bias leaves them out; or merge the adapter into its base",
        )
    work.raw["lora_bias"] = False
    what = "lora_bias: all biases are zero" if size == 0 else f"lora_bias: biases of norm {size:.3g} left out"
    work.steps.append(Step(what, exact=size == 0, bias_norm=size))


# --- PiSSA and kin ----------------------------------------------------------------------------------------------------


def _take_start(work: Work) -> bool:
    init = work.raw.get("init_lora_weights", True)
    if not (isinstance(init, str) and init.lower().startswith(_CHANGED_BASE)):
        return False
    if work.means.initial is None:
        raise InputError(
            f"init_lora_weights={init!r} took its first factors out of the base, and they are needed to undo that",
            where=str(work.folder),
            hint="--initial DIR, the adapter saved before training",
        )
    work.raw["init_lora_weights"] = True
    return True


def _minus_start(work: Work, adapter: Adapter) -> Adapter:
    """The update of the original base: s B A - s B0 A0, of twice the rank, exactly."""
    initial = work.means.initial or work.folder
    config = checked_config({**read_raw_config(initial), "init_lora_weights": True}, initial / CONFIG)
    start = adapter_of(
        initial, config, *read_weights(initial, lambda shapes: require_sides(shapes, initial)), name=adapter.name
    )
    if start.modules.keys() != adapter.modules.keys():
        raise InputError("adapts other modules than the trained adapter", where=str(initial))
    if any(f.shape != adapter.modules[m].shape for m, f in start.modules.items()):
        raise InputError("has other shapes than the trained adapter", where=str(initial))
    if all(
        torch.equal(f.A, start.modules[m].A) and torch.equal(f.B, start.modules[m].B)
        for m, f in adapter.modules.items()
    ):
        raise InputError("equals the trained adapter: not what it was before training", where=str(initial))
    modules = {m: concatenated([f, start.modules[m]], [1.0, -1.0]) for m, f in adapter.modules.items()}
    work.steps.append(Step("the first factors subtracted, rank doubled", exact=True))
    return replace(adapter, modules=modules)
