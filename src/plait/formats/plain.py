"""PEFT variants turned into plain LoRA: exactly where that is possible, else at the best rank with the error stated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapters.config import CONFIG, checked_config, read_raw_config
from plait.adapters.lora import EMBEDDING, LINEAR, Adapter, LoraFactors, concatenated
from plait.adapters.peft_format import adapter_of
from plait.adapters.weights import read_weights
from plait.errors import InputError
from plait.formats.base_weights import OUTPUT, BaseWeights
from plait.formats.lowrank import Cut, best_rank

_MAGNITUDE = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_BIAS, _TOKENS = ".lora_B.bias", ".token_adapter.trainable_tokens_delta"
_ROOT = "base_model.model."
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "wpe", "position_embeddings"}
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "mica")


@dataclass(frozen=True, slots=True)
class Means:
    """What a conversion may use.

    Args:
        base: Local folder of the base in safetensors: for DoRA and trained embeddings.
        initial: The adapter as it was before training: for PiSSA, OLoRA, CorDA and LoRA-GA.
        rank: At most, for what is not low rank; by default the adapter's own.
        drop_bias: Leave a bias of lora_bias out.
    """

    base: Path | None = None
    initial: Path | None = None
    rank: int | None = None
    drop_bias: bool = False


@dataclass(slots=True)
class _Work:
    """An adapter on its way: config and tensors as read, deltas that were worked out, what was done."""

    folder: Path
    raw: dict[str, Any]
    tensors: dict[str, Tensor]
    means: Means
    taken: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    done: list[dict[str, Any]] = field(default_factory=list)


def read_plain(folder: Path, means: Means, *, name: str | None = None) -> tuple[Adapter, list[dict[str, Any]]]:
    """Read a PEFT folder of a plain or convertible variant as a plain LoRA.

    Returns:
        The adapter, and one record per conversion: {"what", "exact", "relative_error", "rank", "errors_at", "worst"}.

    Raises:
        InputError: A variant that cannot be converted, or lacks what its conversion needs; says which.
    """
    raw = read_raw_config(folder)
    tensors, metadata, digests = read_weights(folder)
    work = _Work(folder, raw, dict(tensors), means)
    _take_magnitudes(work)
    _take_biases(work)
    _take_tokens(work)
    started = _take_start(work)
    config = checked_config(work.raw, folder / CONFIG)
    if config.rslora:
        work.done.append({"what": "rsLoRA: alpha / sqrt(rank) written as alpha / rank", "exact": True})
    adapter = adapter_of(folder, config, work.tensors, metadata, digests, name=name)
    if started:
        adapter = _minus_start(work, adapter)
    needed = bool(work.taken.get("magnitudes") or work.taken.get("tokens") or adapter.extras)
    base = BaseWeights(means.base, adapter) if needed and means.base else None
    adapter = _without_magnitudes(work, adapter, base)
    adapter = _without_tokens(work, adapter, base)
    return _without_extras(work, adapter, base), work.done


def _taken(work: _Work, endings: tuple[str, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key in [k for k in work.tensors if k.endswith(endings)]:
        ending = next(e for e in endings if key.endswith(e))
        found[key.removesuffix(ending).removeprefix(_ROOT)] = work.tensors.pop(key)
    return found


def _record(what: str, cuts: Mapping[str, Cut]) -> dict[str, Any]:
    """How good the cuts of all modules are together: |D - D_k| / |D|."""
    total = sum(c.energy for c in cuts.values()) or 1.0
    errors = {m: (sum(c.lost[m] for c in cuts.values()) / total) ** 0.5 for m in (1, 2, 4, 8)}
    worst = max(cuts, key=lambda m: cuts[m].lost[1] / (cuts[m].energy or 1.0))
    rank = max(c.factors.rank for c in cuts.values())
    return {
        "what": what,
        "exact": errors[1] < 1e-6,
        "relative_error": errors[1],
        "rank": rank,
        "errors_at": {str(m * rank): e for m, e in errors.items()},
        "worst": {"module": worst, "relative_error": (cuts[worst].lost[1] / (cuts[worst].energy or 1.0)) ** 0.5},
    }


def _require_base(base: BaseWeights | None, what: str, work: _Work) -> BaseWeights:
    if base is None:
        raise InputError(
            f"{what} is turned into plain LoRA with the base's weights only", where=str(work.folder), hint="--base DIR"
        )
    return base


# --- DoRA -------------------------------------------------------------------------------------------------------------


def _take_magnitudes(work: _Work) -> None:
    found = _taken(work, _MAGNITUDE)
    if bool(found) != bool(work.raw.get("use_dora")):
        raise InputError("use_dora and the magnitude vectors in the file disagree", where=str(work.folder))
    work.raw["use_dora"], work.taken["magnitudes"] = False, found


def _without_magnitudes(work: _Work, adapter: Adapter, base: BaseWeights | None) -> Adapter:
    """DoRA's delta m / |W0 + s B A| * (W0 + s B A) - W0, norms over each output's row, at the best rank.

    Source: PEFT's merge of DoRA layers; Liu et al., arXiv:2402.09353, equation 5.
    """
    magnitudes = work.taken["magnitudes"]
    if not magnitudes:
        return adapter
    base = _require_base(base, "DoRA", work)
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
                f"the magnitudes of {module!r} are not {f.shape[0]} finite numbers", where=str(work.folder)
            )
        gain = magnitude.double().reshape(-1) / changed.norm(dim=1)
        cuts[module] = best_rank(gain[:, None] * changed - W, work.means.rank or f.rank, f.kind)
    if magnitudes:
        raise InputError(f"{next(iter(magnitudes))!r} has magnitudes and no factors", where=str(work.folder))
    work.done.append(_record("DoRA at the best rank", cuts))
    return replace(adapter, modules={m: c.factors for m, c in cuts.items()})


# --- lora_bias --------------------------------------------------------------------------------------------------------


def _take_biases(work: _Work) -> None:
    """A bias of B shifts outputs whatever the input is: no LoRA does. Left out only where it is zero, or on demand."""
    found = _taken(work, (_BIAS,))
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
    work.done.append({"what": what, "exact": size == 0, "bias_norm": size})


# --- PiSSA and kin ----------------------------------------------------------------------------------------------------


def _take_start(work: _Work) -> bool:
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


def _minus_start(work: _Work, adapter: Adapter) -> Adapter:
    """The update of the original base: s B A - s B0 A0, of twice the rank, exactly."""
    initial = work.means.initial or work.folder
    config = checked_config({**read_raw_config(initial), "init_lora_weights": True}, initial / CONFIG)
    start = adapter_of(initial, config, *read_weights(initial), name=adapter.name)
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
    work.done.append({"what": "the first factors subtracted, rank doubled", "exact": True})
    return replace(adapter, modules=modules)


# --- embeddings -------------------------------------------------------------------------------------------------------


def _take_tokens(work: _Work) -> None:
    found = _taken(work, (_TOKENS,))
    work.taken["tokens"] = found
    indices = work.raw.get("trainable_token_indices")
    if bool(found) != bool(indices):
        raise InputError("trainable_token_indices and the tensors in the file disagree", where=str(work.folder))
    if found:
        work.taken["indices"] = {m: _indices(indices, m, len(rows), work) for m, rows in found.items()}
        work.raw["trainable_token_indices"] = None


def _indices(given: Any, module: str, count: int, work: _Work) -> Tensor:
    """The rows of one embedding; a list means the input embedding, an object names its modules."""
    if isinstance(given, dict):
        given = next((v for k, v in given.items() if module == k or module.endswith(f".{k}")), None)
    if not isinstance(given, list) or len(given) != count or not all(isinstance(i, int) and i >= 0 for i in given):
        raise InputError(f"trainable_token_indices do not name the {count} rows of {module!r}", where=str(work.folder))
    return torch.tensor(given, dtype=torch.int64)


def _without_tokens(work: _Work, adapter: Adapter, base: BaseWeights | None) -> Adapter:
    """Rows that replace an embedding's: one rank per row holds their difference to the base's exactly."""
    modules = dict(adapter.modules)
    cut = len(adapter.prefix) + 1 if adapter.prefix else 0
    for module, rows in work.taken["tokens"].items():
        base = _require_base(base, "trainable_token_indices", work)
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
        modules[inside] = LoraFactors(one_hot, change.T.contiguous(), 1.0, EMBEDDING)
        if base.tied:  # PEFT ties the trained rows as well
            modules[OUTPUT] = LoraFactors(change, one_hot.T.contiguous(), 1.0, LINEAR)
        work.done.append({"what": f"{len(indices)} trained tokens of {inside} as rank {len(indices)}", "exact": True})
    return replace(adapter, modules=dict(sorted(modules.items())), target_modules=_targets(adapter, modules))


def _without_extras(work: _Work, adapter: Adapter, base: BaseWeights | None) -> Adapter:
    """Whole trained weights (modules_to_save) as their difference to the base's, at the best rank."""
    if not adapter.extras:
        return adapter
    base = _require_base(base, f"{next(iter(adapter.extras))!r}, trained whole,", work)
    modules, cuts = dict(adapter.modules), {}
    cut = len(adapter.prefix) + 1 if adapter.prefix else 0
    for key, tensor in adapter.extras.items():
        module = key.removesuffix(".weight")[cut:]
        if tensor.ndim != 2 or not key.endswith(".weight") or module in modules:
            raise InputError(
                f"{key!r} was trained whole and is no weight of a linear or embedding module", where=str(work.folder)
            )
        embedding = module.rpartition(".")[2] in _EMBEDDINGS
        shape = (tensor.shape[1], tensor.shape[0]) if embedding else (tensor.shape[0], tensor.shape[1])
        W = base.matrix(module, shape, embedding=embedding)
        change = (tensor.T if embedding else tensor).float() - W
        if bool(change.any()):
            cuts[module] = best_rank(change, work.means.rank or adapter.rank, EMBEDDING if embedding else LINEAR)
        else:
            work.done.append({"what": f"{module} equals the base's and is left out", "exact": True})
    if cuts:
        work.done.append(_record(f"{', '.join(cuts)}, trained whole, at the best rank", cuts))
    modules |= {m: c.factors for m, c in cuts.items()}
    return replace(adapter, modules=dict(sorted(modules.items())), extras={}, target_modules=_targets(adapter, modules))


def _targets(adapter: Adapter, modules: Mapping[str, LoraFactors]) -> tuple[str, ...] | str | None:
    return adapter.target_modules if modules.keys() == adapter.modules.keys() else None
