"""Whether the halves of factors fit together, and fit the rank for which a loader makes room."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from plait.loading import tensor_names as names
from plait.loading.account import Fault
from plait.loading.settings import Settings

_AGAIN = "take the whole file from where it came, or save the adapter again"


class Half(NamedTuple):
    """One half of a module's factors."""

    tensor: str
    kind: str
    shape: tuple[int, ...]


def factor_faults(halves: Mapping[str, list[Half]], settings: Settings) -> Iterator[Fault]:
    """What is wrong with the factors of each module; those that `raises` are refused whole.

    Args:
        halves: Module -> the halves that the file holds of it.
        settings: The config, which says the rank.
    """
    for module, found in halves.items():
        first = found[0]
        kinds = [h.kind for h in found]
        if len(found) == 1:
            other = names.HALVES[first.kind]
            what = f"has no {other} beside it: PEFT starts that half anew, with a warning, and what was trained is lost"
            yield Fault(first.tensor, what, _AGAIN)
        elif len(found) > 2 or names.HALVES[kinds[0]] != kinds[1]:
            yield Fault(first.tensor, f"stands beside {', '.join(kinds[1:])}: not two halves of one update", _AGAIN)
        elif what := _misfit(found, settings.ranks_of(module), bool(settings.parameters_in(_container(module)))):
            what = f"{what}: PEFT stops with a size mismatch"
            yield Fault(first.tensor, what, "restore the config it was saved with", True)


def _container(module: str) -> str:
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module


def _misfit(found: list[Half], ranks: set[float], several: bool) -> str:
    """Why two halves do not fit each other or the rank; "" where they do."""
    first = next(h for h in found if h.kind in (names.A, names.EMBEDDING_A))
    second = next(h for h in found if h is not first)
    a, b = first.shape, second.shape
    told = f"is {list(a)} beside {list(b)}, and the config says rank {' or '.join(f'{r:g}' for r in sorted(ranks))}"
    if len(a) < 2 or len(b) != len(a):
        return f"is {list(a)} beside {list(b)}"
    if several:  # one factor for each expert, side by side
        return "" if a[0] == b[1] and any(a[0] % rank == 0 for rank in ranks) else f"{told} for each expert"
    return "" if a[0] in ranks and (b[1] in ranks or len(a) > 2) else told
