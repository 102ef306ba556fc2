"""Which merges are tried: methods, with and without pico, over a grid of scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from plait.adapters.lora import Adapter
from plait.fidelity.moments import OWN_MOMENTS
from plait.merging import plan_merge
from plait.merging.registry import find_method
from plait.statistics.moments import Statistics

METHODS = ("task_arithmetic", "tsv", "regmean", "least_squares", "iso_c", "knots")
SCALES = (0.15, 0.25, 0.4, 0.6, 0.9, 1.3, 2.0)
# Methods whose factors are those of the adapters side by side, each in its own ranks.
METHODS_WITH_RANKS_APART = ("task_arithmetic", "tsv", "regmean", "least_squares")
PICO = "pico"


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to merge, its scale left open.

    Args:
        method: A name in `merge_methods()`.
        calibrate: "pico" or None.
        moments: "base" or "own" (each adapter's own activations) where the method needs moments; else "".
    """

    method: str
    calibrate: str | None = None
    moments: str = ""

    @property
    def label(self) -> str:
        """What a table calls it."""
        own = " (own moments)" if self.moments == OWN_MOMENTS else ""
        return self.method + (f" + {self.calibrate}" if self.calibrate else "") + own


@dataclass(frozen=True, slots=True)
class Tried:
    """A merge at scale 1 and the recipe that made it.

    Args:
        recipe: How.
        adapter: The merge.
        near: Scale at which it is expected to be best.
    """

    recipe: Recipe
    adapter: Adapter
    near: float = 1.0


def recipes(kinds: Sequence[str], methods: Sequence[str] = METHODS) -> Iterator[Recipe]:
    """List every method with and without pico; those that need moments once for each kind of moments there is.

    >>> [recipe.label for recipe in recipes((), ("tsv",))]
    ['tsv', 'tsv + pico']

    Args:
        kinds: Any of "base" and "own"; () leaves those methods out.
        methods: Names of methods.
    """
    for method in methods:
        for calibrate in (None, PICO):
            if not find_method(method).needs:
                yield Recipe(method, calibrate)
            else:
                yield from (Recipe(method, calibrate, kind) for kind in kinds)


def merged_by(
    recipe: Recipe,
    adapters: Sequence[Adapter],
    moments: Mapping[str, Mapping[str, Statistics]],
    *,
    base: str | None = None,
) -> Adapter:
    """Merge by a recipe at scale 1.

    Args:
        recipe: How.
        adapters: What.
        moments: Kind of moments -> adapter -> statistics.
        base: Base id of the result where the adapters name one base by different names.
    """
    plan = plan_merge(
        adapters,
        recipe.method,
        scale=1.0,
        calibrate=recipe.calibrate,
        statistics=moments.get(recipe.moments),
        base=base,
    )
    return plan.run("merged").adapter


def groups_of(tried: Tried, adapters: Sequence[Adapter]) -> dict[str, list[int]]:
    """Say which ranks of a merge came from which adapter: concatenations keep them apart; of others all are one group."""
    groups = {}
    for module, f in tried.adapter.modules.items():
        ranks = [a.modules[module].rank for a in adapters if module in a.modules]
        apart = tried.recipe.method in METHODS_WITH_RANKS_APART and sum(ranks) == f.rank
        groups[module] = ranks if apart else [f.rank]
    return groups
