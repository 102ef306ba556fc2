"""Experts that an adapter names one by one, as transformers 4 has them: what PEFT makes of those with transformers 5, which fuses them.

PEFT 0.21 turns such factors into those of the fused weights for some types of models: it takes their names out of `target_modules`, and the
rank and alpha of the fused weights from `r` and `lora_alpha`. For other types it finds no module and drops them. The adapter does
not say which type its base is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from plait.loading.settings import Settings

_SINGLE = re.compile(r"\.experts\.(\d+)\.(\w+)$")


class SingleExpert(NamedTuple):
    """Which expert a module's name means, and which of its layers."""

    number: int
    leaf: str


def single_expert(module: str) -> SingleExpert | None:
    """Tell what a name of one expert's layer means; None for others.

    >>> single_expert("model.layers.1.mlp.experts.3.up_proj")
    SingleExpert(number=3, leaf='up_proj')
    """
    hit = _SINGLE.search(module)
    return SingleExpert(int(hit[1]), hit[2]) if hit else None


def single_expert_notes(modules: Iterable[str], settings: Settings | None = None) -> Iterator[str]:
    """Say what PEFT with transformers 5 may make of an adapter's experts; nothing of adapters without such names.

    Args:
        modules: Names, as the base of transformers 4 has them.
        settings: Its config, where there is one.
    """
    names = sorted(modules)
    leaves = {name: hit.leaf for name in names if (hit := single_expert(name))}
    if not leaves:
        return
    first = next(iter(leaves))
    yield (
        f"{first} is one expert, as transformers 4 names them: with transformers 5 PEFT takes it over for Mixtral, Qwen3-MoE and kin, "
        "and for others, such as Qwen2-MoE, drops it in silence; plait merge --bake is right for all of them"
    )
    kinds = {*leaves.values()}
    if other := next((n for n in names if n not in leaves and n.rpartition(".")[2] in kinds), None):
        yield f"{other} is called as the experts' layers are: where PEFT with transformers 5 takes those over, it drops this in silence"
    if settings is not None:
        usual = settings.number("r", 8), settings.number("lora_alpha", 8)
        if own := next((n for n in leaves if (settings.rank_of(n), settings.alpha_of(n)) != usual), None):
            yield f"{own} has a rank or an alpha of its own, which PEFT with transformers 5 does not follow"
