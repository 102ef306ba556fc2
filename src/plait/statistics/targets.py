"""Which modules of a model are targeted, by PEFT's own rule, and what they are called relative to the backbone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from plait.border.module_names import named_by
from plait.border.patterns import by_engine
from plait.errors import UsageError
from plait.model.base import backbone_of
from plait.model.layers import linear_shape
from plait.statistics.routers import has_experts, is_gate, router_shape

MAX_PATTERN_SECONDS = 10.0  # for a pattern on all of a model's names
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_HEADS = ["classifier", "score"]  # what PEFT keeps out of LoRA for sequence classification


@dataclass(frozen=True, slots=True)
class Target:
    """One targeted linear module.

    Args:
        name: Relative to the backbone; the full name where it lies outside.
        module: The linear layer itself (PEFT's `base_layer` where the model already carries LoRA).
        shape: (out, in) of the weight.
        fan_in_fan_out: Whether the weight is stored as (in, out) (Conv1D).
        is_router: Whether it is no linear layer, but applies a matrix of its own (see `routers`).
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]
    fan_in_fan_out: bool
    is_router: bool = False


def find_targets(
    model: nn.Module,
    target_modules: Sequence[str] | str | None,
    *,
    exclude_modules: Sequence[str] | str | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
    layers_pattern: Sequence[str] | str | None = None,
) -> tuple[dict[str, Target], str]:
    """Find the modules PEFT would adapt, in the model's own order, and the backbone's attribute ("" without one).

    Args:
        model: A transformers model, a PeftModel, or either wrapped (compiled, DDP, FSDP).
        target_modules: List of suffixes, a regex over whole names, "all-linear", or None to take the LoRA layers of a
            PeftModel.
        exclude_modules: PEFT's `exclude_modules`.
        layers_to_transform: PEFT's `layers_to_transform`.
        layers_pattern: PEFT's `layers_pattern`.

    Raises:
        UsageError: A bad or endless regex; a target that matches nothing (with near names); a match that is no linear
            layer.
    """
    base = unwrapped(model)
    candidates = _candidates(base)
    if target_modules is None:
        matched = [n for n, (_, adapted) in candidates.items() if adapted]
        if not matched:
            raise UsageError("no target_modules given and the model carries no LoRA layers")
    else:
        config = _peft_config(target_modules, exclude_modules, layers_to_transform, layers_pattern)
        matched = _matched(base, config, {n: m for n, (m, _) in candidates.items()})
    prefix = backbone_of(base)[1]
    cut = f"{prefix}." if prefix else ""
    targets = [_target(n.removeprefix(cut), n, candidates[n][0]) for n in matched]
    return {t.name: t for t in targets}, prefix


def unwrapped(model: nn.Module) -> nn.Module:
    """Find the transformers model inside PEFT, torch.compile, DDP and FSDP.

    >>> unwrapped(nn.Identity())
    Identity()
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            inner = model.module
        if inner is None and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            inner = cast(Any, model).get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def _candidates(base: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """Clean name -> (module, whether it carries LoRA), without what lies inside a LoRA layer."""
    candidates: dict[str, tuple[nn.Module, bool]] = {}
    inside: list[str] = []
    for raw, module in base.named_modules():
        if not raw or any(raw.startswith(f"{p}.") for p in inside):
            continue
        name = ".".join(part for part in raw.split(".") if part not in _WRAPPERS)
        layer = getattr(module, "base_layer", None)
        if isinstance(layer, nn.Module):
            inside.append(raw)
            candidates[name] = (layer, True)
        else:
            candidates.setdefault(name, (module, False))
    return candidates


def _peft_config(
    targets: Sequence[str] | str,
    exclude: Sequence[str] | str | None,
    layers: Sequence[int] | int | None,
    pattern: Sequence[str] | str | None,
) -> Any:
    from peft import LoraConfig

    plain = [x if isinstance(x, str) or x is None else list(x) for x in (targets, exclude, pattern)]
    if not plain[0]:
        raise UsageError("target_modules is empty")
    where = layers if isinstance(layers, int) or layers is None else list(layers)
    try:
        return LoraConfig(
            target_modules=plain[0],
            exclude_modules=plain[1],
            layers_to_transform=where,
            layers_pattern=plain[2],
            task_type="SEQ_CLS",
            modules_to_save=list(_HEADS),
        )
    except (ValueError, TypeError) as e:
        raise UsageError(str(e).splitlines()[0], where="target_modules") from None


def _matched(base: nn.Module, config: Any, modules: Mapping[str, nn.Module]) -> list[str]:
    from peft.tuners import tuners_utils

    for key in ("target_modules", "exclude_modules"):
        value = getattr(config, key)
        if isinstance(value, str) and value.lower() != "all-linear":
            require_quick_regex(value, modules, key)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        linear = [n for n, m in modules.items() if linear_shape(m) is not None]
        routers = [n for n, m in modules.items() if is_gate(m)]  # as PEFT's has them, by target_parameters
        kept = set(cast(Any, tuners_utils._maybe_include_all_linear_layers(config, base)).target_modules)
        config.target_modules = [n for n in linear if n in kept or _was_adapted(base, n)] + routers
    # PEFT finds a layer's index only behind a prefix ("model.layers.0."), which a bare backbone's names lack.
    bare = config.layers_to_transform is not None and not backbone_of(base)[1]
    lead = f"{getattr(base, 'base_model_prefix', '') or 'model'}." if bare else ""
    hits = [n for n in modules if tuners_utils.check_target_module_exists(config, lead + n)]
    _require_all_used(config.target_modules, hits, modules)
    return hits


def _was_adapted(base: nn.Module, name: str) -> bool:
    try:
        return hasattr(base.get_submodule(name), "base_layer")
    except AttributeError:
        return False


def require_quick_regex(pattern: str, names: Iterable[str], key: str) -> None:
    """Refuse a regular expression that is none, or that takes too long on a model's names.

    Args:
        pattern: PEFT's, of whole names.
        names: All names of the model.
        key: The argument it came in, for the message.

    Raises:
        UsageError: It is no regular expression, or it takes more than `MAX_PATTERN_SECONDS`.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise UsageError(f"{key} is not a regular expression: {e}", where=key) from None
    try:  # by the engine itself, not by an automaton: PEFT matches with it in this process afterwards
        by_engine(pattern, names, MAX_PATTERN_SECONDS, whole=True)
    except TimeoutError:
        raise UsageError(
            f"the pattern takes over {MAX_PATTERN_SECONDS:.0f} s on this model's names",
            where=key,
            hint="nested repeats backtrack",
        ) from None


def _require_all_used(targets: Any, hits: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    wanted = [targets] if isinstance(targets, str) else sorted(targets)
    for target in wanted:
        if not hits or (not isinstance(targets, str) and not _used(target, hits, modules)):
            known = sorted({n.rpartition(".")[2] for n, m in modules.items() if linear_shape(m) is not None})
            near = difflib.get_close_matches(target, known, n=3, cutoff=0.4) or known[:12]
            fused = f"; {target} is a fused parameter, not a module" if _is_parameter(target, modules) else ""
            raise UsageError(
                f"target module {target!r} matches nothing{fused}",
                where="target_modules",
                hint=f"near: {', '.join(near)}",
            )


def _used(target: str, hits: Sequence[str], modules: Mapping[str, nn.Module]) -> bool:
    """Whether a suffix names a module at all; one that layers_to_transform or exclude_modules left out still does."""
    return any(named_by(n, target) for n in (*hits, *modules))


def _is_parameter(target: str, modules: Mapping[str, nn.Module]) -> bool:
    last = target.rpartition(".")[2]
    return any(p.ndim == 3 and n == last for m in modules.values() for n, p in m.named_parameters(recurse=False))


def _target(name: str, full: str, module: nn.Module) -> Target:
    if has_experts(module):  # PEFT's wrapper of them has in_features, too
        raise UsageError(
            "holds fused experts: each reads tokens of its own inside, where nothing can watch",
            where=full,
            hint="target_modules without experts; their start is PEFT's own",
        )
    shape = linear_shape(module)
    if shape is None and (own := router_shape(module)):
        return Target(name, module, own, False, True)
    if shape is None:
        raise UsageError(
            f"matches a {type(module).__name__}, not a linear layer",
            where=full,
            hint="token ids have no second moment" if isinstance(module, nn.Embedding) else "narrow target_modules",
        )
    return Target(name, module, shape, hasattr(module, "nf"))
