"""PEFT's target_parameters: LoRA on weights that are no module's, such as a mixture's fused experts, as ordinary matrices.

A fused weight (experts, out, in) has one pair of factors for all its experts: A (experts * r, in) holds the experts' rows one
expert below the other, B (out, r * experts) their columns interleaved, so that expert e has A[e r : (e+1) r] and
B[:, e :: experts], and its update is scaling * B_e A_e. Each expert is a module of its own here, called ``experts.down_proj[3]``:
whatever holds for matrices holds for it.

Several weights of one module nest in PEFT's file: each further one, in the order in which the model's class defines them,
wraps those before it, so that the first lies under the most ``base_layer``. The file does not name them; the config and
their order do.

Source: PEFT 0.21, `lora.ParamWrapper` (`get_delta_weight`) and `BaseTuner._inject_parameters`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from plait.adapters.lora import EXPERT, Adapter, LoraFactors
from plait.border.counts import plural
from plait.border.module_names import named_by
from plait.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

WRAPPED = ".base_layer"
# The order in which model classes define a module's fused weights; transformers' own, and the usual three matrices.
_ORDER = (
    *("gate_up_proj", "gate_up_proj_bias", "gate_proj", "w1", "up_proj", "v1", "w3"),
    *("down_proj", "down_proj_bias", "w2"),
)
_MEMBER = re.compile(r"(.+)\[(\d+)\]")


def member_name(parameter: str, expert: int) -> str:
    """What one expert of a fused weight is called."""
    return f"{parameter}[{expert}]"


def member_of(module: str) -> tuple[str, int] | None:
    """The fused weight and the number of the expert that a module's name means; None for others."""
    found = _MEMBER.fullmatch(module)
    return (found[1], int(found[2])) if found else None


def stacks_of(modules: Mapping[str, LoraFactors]) -> dict[str, dict[int, LoraFactors]]:
    """Fused weight -> its experts' factors by number, in order."""
    found: dict[str, dict[int, LoraFactors]] = {}
    for module, factors in modules.items():
        if factors.kind == EXPERT and (member := member_of(module)):
            found.setdefault(member[0], {})[member[1]] = factors
    return {p: dict(sorted(experts.items())) for p, experts in found.items()}


# --- reading ----------------------------------------------------------------------------------------------------------


def split_wrapped(module: str) -> tuple[str, int]:
    """A name in the file without its ``base_layer`` parts, and how many there were."""
    depth = 0
    while module.endswith(WRAPPED):
        module, depth = module.removesuffix(WRAPPED), depth + 1
    return module, depth


def parameter_names(
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, int]],
    targets: Sequence[str],
    by_module: Sequence[str],
    where: str,
) -> dict[str, str]:
    """Which names in the file are parameters, and what those are called: ``experts.base_layer`` -> ``experts.gate_up_proj``.

    Args:
        names: Modules as the file names them.
        shapes: Name -> (out, in) of its update.
        targets: The config's target_parameters.
        by_module: The config's target_modules, where they are a list: what they match is a module.
        where: The folder, for errors.

    Raises:
        InputError: Factors without a parameter, or of which it cannot be told to which one they belong.
    """
    depths: dict[str, list[int]] = {}
    for name in names:
        owner, depth = split_wrapped(name)
        depths.setdefault(owner, []).append(depth)
    found: dict[str, str] = {}
    for owner, levels in depths.items():
        known = _targeted(owner, len(levels), targets, by_module)
        if not known and levels == [0]:
            continue
        if sorted(levels) != list(range(len(levels))) or len(known) != len(levels):
            raise InputError(
                f"{owner!r} has factors of {plural(len(levels), 'parameter')}, and target_parameters names "
                f"{', '.join(known) or 'none'} of it",
                where=where,
                hint="the config must list the parameters that were trained, as PEFT writes it",
            )
        ordered = _in_order(owner, known, where)
        for depth, parameter in enumerate(reversed(ordered)):
            found[owner + WRAPPED * depth] = f"{owner}.{parameter}"
        _require_fit(owner, {p: shapes[owner + WRAPPED * d] for d, p in enumerate(reversed(ordered))}, where)
    return found


def _targeted(owner: str, count: int, targets: Sequence[str], by_module: Sequence[str]) -> list[str]:
    """The parameters of a module that a config names: by the whole name or an ending of it, as PEFT matches them.

    A target without a dot, "down_proj", may be any module's: it counts where as many parameters were adapted, and not
    where target_modules has the module.
    """
    qualified = _qualified(owner, targets)
    bare = sorted({t for t in targets if "." not in t})
    if len(qualified) == count or not bare:
        return qualified
    both = sorted({*qualified, *bare})
    if qualified or count > 1:
        return both
    layer = any(named_by(owner, t) for t in by_module)
    return bare if len(bare) == count and not layer else []


def _qualified(owner: str, targets: Sequence[str]) -> list[str]:
    found = set()
    for target in targets:
        module, _, parameter = target.rpartition(".")
        if module and named_by(owner, module):
            found.add(parameter)
    return sorted(found)


def _in_order(owner: str, parameters: Sequence[str], where: str) -> list[str]:
    if len(parameters) == 1:
        return list(parameters)
    if unknown := [p for p in parameters if p not in _ORDER]:
        raise InputError(
            f"which factors of {owner!r} belong to {unknown[0]!r} depends on the model's class, which the adapter does not tell",
            where=where,
            hint="an adapter for each of these parameters can be read",
        )
    return sorted(parameters, key=_ORDER.index)


def _require_fit(owner: str, shapes: Mapping[str, tuple[int, int]], where: str) -> None:
    """A gated expert's two weights fit together one way only: what the one gives, halved, is what the other takes."""
    if shapes.keys() != {"gate_up_proj", "down_proj"}:
        return
    (out, width), (back, inner) = shapes["gate_up_proj"], shapes["down_proj"]
    if (out, width) != (2 * inner, back) and (width, out) != (2 * back, inner):
        raise InputError(
            f"the factors of {owner!r} are no gate_up_proj ({out}, {width}) around a down_proj ({back}, {inner})",
            where=where,
            hint="damaged, or of a model whose weights are nested in another order",
        )


def experts_of(parameter: str, A: Tensor, B: Tensor, rank: int, scaling: float, where: str) -> dict[str, LoraFactors]:
    """Module -> factors of a parameter: one for each expert; a plain matrix called "weight" is its module's.

    Args:
        parameter: Its name.
        A: (experts * rank, in).
        B: (out, rank * experts).
        rank: Of each expert, by the config.
        scaling: Of all.
        where: The folder, for errors.

    Raises:
        InputError: Rows that are no multiple of the rank, or another number of columns.
    """
    if A.ndim != 2 or B.ndim != 2 or not A.shape[0] or A.shape[0] != B.shape[1] or A.shape[0] % rank:
        raise InputError(
            f"parameter {parameter!r}: A {tuple(A.shape)}, B {tuple(B.shape)}, and rank {rank} in adapter_config.json disagree",
            where=where,
        )
    count = A.shape[0] // rank
    owner, _, last = parameter.rpartition(".")
    if count == 1 and last == "weight":
        return {owner: LoraFactors(A, B, scaling)}
    rows = A.view(count, rank, A.shape[1])
    columns = B.reshape(B.shape[0], rank, count).permute(2, 0, 1).contiguous()
    return {member_name(parameter, e): LoraFactors(rows[e], columns[e], scaling, EXPERT) for e in range(count)}


# --- writing ----------------------------------------------------------------------------------------------------------


def is_parameter(module: str, targets: Sequence[str]) -> bool:
    """Whether a module's own weight is adapted as a parameter."""
    key = f"{module}.weight"
    return any(named_by(key, t) for t in targets if t.rpartition(".")[2] == "weight")


def keeps_targets(adapter: Adapter) -> bool:
    """Whether its target_parameters, as they were read, name exactly the parameters that it adapts now."""
    present: dict[str, set[str]] = {}
    for parameter in parameters_of(adapter):
        owner, _, last = parameter.rpartition(".")
        present.setdefault(owner, set()).add(last)
    bare = {t for t in adapter.target_parameters if "." not in t}
    for owner, names in present.items():
        wanted = set(_qualified(owner, adapter.target_parameters)) | (bare if names != {"weight"} else bare & names)
        if wanted != names:
            return False
    return True


def parameters_of(adapter: Adapter) -> list[str]:
    """The weights that an adapter adapts as parameters, fused or not, by name."""
    plain = [
        f"{m}.weight"
        for m, f in adapter.modules.items()
        if f.kind != EXPERT and is_parameter(m, adapter.target_parameters)
    ]
    return sorted([*stacks_of(adapter.modules), *plain])


def stored_names(parameters: Sequence[str]) -> dict[str, str]:
    """Parameter -> what the file calls its module: those of one module nest, the first one deepest.

    Raises:
        InputError: Several of one module, in an order that is not known.
    """
    owners: dict[str, list[str]] = {}
    for name in parameters:
        owner, _, last = name.rpartition(".")
        owners.setdefault(owner, []).append(last)
    found = {}
    for owner, names in owners.items():
        for depth, last in enumerate(reversed(_in_order(owner, names, owner))):
            found[f"{owner}.{last}"] = owner + WRAPPED * depth
    return found


def stacked(experts: Mapping[int, LoraFactors], rank: int) -> tuple[Tensor, Tensor]:
    """PEFT's A (experts * rank, in) and B (out, rank * experts) of a fused weight; lower ranks are filled up with zeros."""
    first = next(iter(experts.values()))
    (out, width), count = first.shape, len(experts)
    A, B = first.A.new_zeros(count, rank, width), first.B.new_zeros(out, rank, count)
    for e, f in experts.items():
        A[e, : f.rank], B[:, : f.rank, e] = f.A, f.B
    return A.reshape(count * rank, width), B.reshape(out, rank * count)


def require_whole(adapter: Adapter) -> None:
    """Refuse a fused weight of which experts are missing: PEFT's factors are those of all.

    Raises:
        InputError: One is missing, or they differ in shape.
    """
    for parameter, experts in stacks_of(adapter.modules).items():
        if list(experts) != list(range(len(experts))):
            gone = next(e for e in range(len(experts) + 1) if e not in experts)
            raise InputError(f"expert {gone} of {parameter!r} is missing", where=adapter.name)
        if len({f.shape for f in experts.values()}) > 1:
            raise InputError(f"the experts of {parameter!r} differ in shape", where=adapter.name)


class Waiting:
    """Experts that come one by one, from any thread, until all of their fused weight are there.

    Args:
        shapes: All modules, whose factors may be shapes on the meta device.
    """

    def __init__(self, shapes: Mapping[str, LoraFactors]) -> None:
        self.expected = {p: len(experts) for p, experts in stacks_of(shapes).items()}
        self.held: dict[str, dict[int, LoraFactors]] = {}
        self._lock = threading.Lock()

    def add(self, module: str, factors: LoraFactors) -> tuple[str, dict[int, LoraFactors]] | None:
        """The fused weight and all its experts once the last of them has come, None before."""
        member = member_of(module)
        if member is None:
            raise ValueError(f"{module} is no expert")
        parameter, number = member
        with self._lock:
            experts = self.held.setdefault(parameter, {})
            experts[number] = factors
            if len(experts) < self.expected[parameter]:
                return None
            return parameter, dict(sorted(self.held.pop(parameter).items()))


def same_experts(one: Mapping[str, LoraFactors], other: Mapping[str, LoraFactors]) -> str | None:
    """A fused weight of which two adapters have different numbers of experts, with both numbers; None where there is none."""
    mine, theirs = stacks_of(one), stacks_of(other)
    for parameter in mine.keys() & theirs.keys():
        if len(mine[parameter]) != len(theirs[parameter]):
            return f"{parameter!r} has {plural(len(mine[parameter]), 'expert')} and {len(theirs[parameter])}"
    return None
