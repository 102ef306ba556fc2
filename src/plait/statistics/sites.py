"""Which modules read one and the same tensor, and in which part of the model: found on one example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from plait.errors import InputError, RunError
from plait.model.base import backbone_of
from plait.statistics.masks import DECODER, MAIN
from plait.statistics.routers import checked_routers
from plait.statistics.targets import Target, unwrapped


@dataclass(frozen=True, slots=True)
class SiteMap:
    """What reads what.

    Args:
        site_of: Module -> site, named after the first module called with it; in the model's order.
        role_of: Site -> "main" or "decoder": whose mask counts there.
        calls: All modules in the order of their calls in one forward pass.
    """

    site_of: Mapping[str, str]
    role_of: Mapping[str, str]
    calls: Sequence[str]

    @property
    def sites(self) -> list[str]:
        """Sites in the order of the modules."""
        return list(dict.fromkeys(self.site_of.values()))

    @property
    def once_each(self) -> bool:
        """Whether every module is called exactly once in a forward pass."""
        return len(self.calls) == len(set(self.calls))


def find_sites(
    model: nn.Module,
    targets: Mapping[str, Target],
    forward: Callable[[], Any],
) -> SiteMap:
    """Run one example and group the modules by the tensors they are called with.

    Two modules share a site when every call of the one had the same memory, shape and version as the same call of the
    other; all inputs are kept alive for the length of the example, so that an address cannot stand for two tensors.

    Args:
        model: The model, wrapped or not.
        targets: Modules to watch.
        forward: Runs the example.

    Raises:
        InputError: A module was never called.
        RunError: An input is sharded over devices, or not of the module's width.
    """
    alive: list[Tensor] = []
    seen: dict[str, list[tuple[Any, ...]]] = {}
    calls: list[str] = []
    encoder_outputs: list[Tensor] = []
    roles: dict[str, str] = {}
    encoder = _encoder_of(model)
    inside = set(map(id, encoder.modules())) if encoder is not None else set()

    def watch(target: Target) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            h = input_of(target, args, kwargs)
            alive.append(h)
            calls.append(target.name)
            seen.setdefault(target.name, []).append(memory_of(h))
            from_encoder = any(memory_of(h)[:2] == memory_of(e)[:2] for e in encoder_outputs)
            main = encoder is None or id(target.module) in inside or from_encoder
            roles[target.name] = MAIN if main else DECODER

        return hook

    handles = [t.module.register_forward_pre_hook(watch(t), with_kwargs=True) for t in targets.values()]
    if encoder is not None:
        handles.append(encoder.register_forward_hook(lambda _m, _a, out: encoder_outputs.append(out[0])))
    try:
        with checked_routers({n: t.module for n, t in targets.items() if t.is_router}):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return _grouped(targets, seen, calls, roles)


def _grouped(
    targets: Mapping[str, Target],
    seen: Mapping[str, list[tuple[Any, ...]]],
    calls: Sequence[str],
    roles: Mapping[str, str],
) -> SiteMap:
    if missing := [name for name in targets if name not in seen]:
        raise InputError(
            f"never called: {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            where=missing[0],
            hint="the model does not use this module; take it out of target_modules",
        )
    first: dict[tuple[tuple[Any, ...], ...], str] = {}
    for name in dict.fromkeys(calls):
        first.setdefault(tuple(seen[name]), name)
    site_of = {name: first[tuple(seen[name])] for name in targets if name in seen}
    return SiteMap(site_of, {s: roles[s] for s in dict.fromkeys(site_of.values())}, list(calls))


def memory_of(h: Tensor) -> tuple[Any, ...]:
    """Tell one tensor in memory from another while both are alive."""
    version = h._version if not h.is_inference() else 0
    return h.data_ptr(), tuple(h.shape), h.stride(), version


def input_of(target: Target, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Find the tensor a module was called with, whole and of its width; to be called as the module is.

    Raises:
        RunError: Tensor-parallel: the input or the weight is a shard.
    """
    h = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(h, Tensor):
        raise RunError(f"was called with {type(h).__name__}, expected a tensor", where=target.name)
    if _is_sharded(getattr(target.module, "weight", None)):  # then its outputs are a shard too, whatever it reads
        raise RunError("its weight is sharded by tensor parallelism", where=target.name, hint=_UNSHARD)
    if hasattr(h, "placements"):  # DTensor
        if _is_sharded(h):
            raise RunError(_SHARDED, where=target.name, hint=_UNSHARD)
        h = h.to_local()  # type: ignore[attr-defined]
    if h.shape[-1] != target.shape[1]:
        if target.shape[1] % h.shape[-1] == 0:
            raise RunError(f"{_SHARDED}: {h.shape[-1]} of {target.shape[1]} features", where=target.name, hint=_UNSHARD)
        raise RunError(f"reads {tuple(h.shape)}, its weight has width {target.shape[1]}", where=target.name)
    return h


def _is_sharded(tensor: Any) -> bool:
    """Whether a DTensor is split; what FSDP splits is whole again while its module runs."""
    return not all(p.is_replicate() for p in getattr(tensor, "placements", ()))


_SHARDED = "its input is sharded by tensor parallelism, so no rank sees a whole second moment"
_UNSHARD = "load the base without tp_plan; FSDP or one GPU with layer groups works"


def _encoder_of(model: nn.Module) -> nn.Module | None:
    base = unwrapped(model)
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return None
    encoder = getattr(backbone_of(base)[0], "encoder", None)
    return encoder if isinstance(encoder, nn.Module) else None
