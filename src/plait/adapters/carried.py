"""What a merge does with tensors beside the factors: weights trained whole, and PEFT's copies of the base's."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from plait.adapters.arrays import equal
from plait.adapters.beside import COPY, declared_by, no_matrix, undeclared
from plait.adapters.lora import Adapter
from plait.errors import InputError, RunError

if TYPE_CHECKING:
    from torch import Tensor

# A sum of coefficients this near 1 is 1.
_NEAR = 1e-9


@dataclass(frozen=True, slots=True)
class Carried:
    """Tensors beside the factors of a result.

    Args:
        whole: Weights trained whole, by name.
        whole_from: Name of each -> the adapter it came from (the first, where several hold the same).
        saved: What `modules_to_save` says of them.
        copies: The base's own weights, as PEFT saves them under adapted embeddings and output layers.
    """

    whole: dict[str, Tensor] = field(default_factory=dict)
    whole_from: dict[str, str] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    copies: dict[str, Tensor] = field(default_factory=dict)


def carried(adapters: Sequence[Adapter]) -> Carried:
    """The tensors beside the factors of all adapters together.

    Raises:
        InputError: One name with two contents, a weight that one adapter trained whole and another as factors, or one that
            no `modules_to_save` declares: PEFT would write it over the base's.
    """
    for adapter in adapters:
        _require_declared(adapter)
    whole, owner = _united(adapters, "both trained {key!r} whole and it differs", [a.extras for a in adapters])
    copies, _ = _united(
        adapters,
        "hold different copies of the base's {key!r}: they were not trained on one base",
        [a.copies for a in adapters],
    )
    for key, name in owner.items():
        module = key.removesuffix(".weight")
        for adapter in adapters:
            if any(adapter.full_name(m) == module for m in adapter.modules):
                raise InputError(
                    f"{name!r} trained {key!r} whole and {adapter.name!r} by factors",
                    where=adapter.name,
                    hint=_way(next(a for a in adapters if a.name == name)),
                )
    saved = sorted({s for a in adapters for s in a.modules_to_save})
    return Carried(whole, owner, tuple(saved), copies)


def _require_declared(adapter: Adapter) -> None:
    """Refuse a whole weight that takes the base's place: it would stay there when the adapter is switched off."""
    if loose := undeclared(adapter.extras, adapter.modules_to_save):
        names = ", ".join(sorted({key.removesuffix(".weight").rpartition(".")[2] for key in loose}))
        kept = f"modules_to_save: {names} in adapter_config.json keeps it apart from the base's"
        low = f"plait convert {_place(adapter)} --base BASE makes it a low-rank update; or, where no output layer is tied to it, "
        raise InputError(
            f"{loose[0]!r} was trained whole, and modules_to_save does not name it: loaded, it is written over the base's own weight",
            where=adapter.name,
            hint=kept if no_matrix(adapter.extras) else low + kept,
        )


def _united(
    adapters: Sequence[Adapter], differing: str, held: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    found: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for adapter, tensors in zip(adapters, held, strict=True):
        for key, tensor in tensors.items():
            if key in found and not equal(found[key], tensor):
                raise InputError(
                    f"{owner[key]!r} and {adapter.name!r} {differing.format(key=key)}",
                    where=adapter.name,
                    hint=None if COPY in key else _way(adapter),
                )
            found.setdefault(key, tensor)
            owner.setdefault(key, adapter.name)
    return found, owner


def require_exact(adapters: Sequence[Adapter], coefficients: Sequence[float] | None, how: str) -> None:
    """Refuse a merge that would have to change a weight that was trained whole.

    Merged, such a weight is W0 + sum_t c_t (W_t - W0) over the adapters that hold it; the base's W0 is not at hand. Where the
    c_t of all that hold it sum to 1 (and they hold the same, which `carried` saw to), that is W itself, whatever W0 is.

    Args:
        adapters: Of the merge.
        coefficients: One each, the scale included; None where the method is no weighted sum.
        how: Names the method in errors.

    Raises:
        InputError: A weight that cannot be carried as it is; with the way out.
    """
    for key in {k: None for a in adapters for k in a.extras}:
        holders = [i for i, a in enumerate(adapters) if key in a.extras]
        name = adapters[holders[0]].name
        if coefficients is None:
            why = f"{how} is no weighted sum, and what it makes of that weight depends on the base's"
        elif abs(total := sum(coefficients[i] for i in holders) - 1) > _NEAR:
            why = f"it counts {total + 1:g} times here, so that the result depends on the base's weight, which is not at hand"
        else:
            continue
        raise InputError(f"{key!r} was trained whole: {why}", where=name, hint=_way(adapters[holders[0]]))


def _way(adapter: Adapter) -> str:
    if key := no_matrix(adapter.extras):
        return (
            f"{key} is no matrix, which no low-rank update holds: at a weight of 1 in a sum (--method task_arithmetic --scale 1) "
            "it is carried as it is"
        )
    return (
        f"plait convert {_place(adapter)} --base BASE makes it a low-rank update, which every method "
        "merges; at a weight of 1 in a sum (--method task_arithmetic --scale 1) it is carried as it is"
    )


def _place(adapter: Adapter) -> str:
    return shlex.quote(str(adapter.source.get("path", adapter.name)))


def verify_carried(wanted: Carried, written: Adapter) -> None:
    """Compare the tensors beside the factors that were written with those that were to be.

    Raises:
        RunError: One is missing, other than it was, or there is one more.
    """
    for what, mine, theirs in (("weights", wanted.whole, written.extras), ("copies", wanted.copies, written.copies)):
        differing = [k for k in {**mine, **theirs} if k not in mine or k not in theirs or not equal(mine[k], theirs[k])]
        if differing:
            raise RunError(f"the written {what} beside the factors differ: {differing[0]!r}", hint="please report this")
    if {*written.modules_to_save} != {s for s in wanted.saved if any(declared_by(k, [s]) for k in wanted.whole)}:
        raise RunError("the written config declares other whole weights", hint="please report this")


def lines(wanted: Carried) -> list[str]:
    """What is carried, in words, for the record and the screen."""
    found = [
        f"{key} of {name} was trained whole: carried as it is (declared in modules_to_save)"
        for key, name in wanted.whole_from.items()
    ]
    found += [f"{key} is the base's own weight, as PEFT saves it: carried, not merged" for key in wanted.copies]
    return found
