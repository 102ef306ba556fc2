"""What mergekit's methods mean for adapters: each recipe as a method, options, weights and a scale of plait's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from plait.errors import UsageError
from plait.merging.spec import MergeSpec

_EXACT = 1e-9


@dataclass(frozen=True, slots=True)
class Model:
    """An input of a recipe.

    Args:
        base: What stands before the plus.
        folder: The adapter behind it; "" for the base alone.
        parameters: Its own.
    """

    base: str
    folder: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MergekitRecipe:
    """A recipe, checked but for what its method demands. `shared` holds for models that do not say otherwise."""

    method: str
    base_model: str | None
    models: tuple[Model, ...]
    shared: Mapping[str, Any]

    @property
    def adapters(self) -> list[Model]:
        """The models that are not the base."""
        return [m for m in self.models if m.folder]

    def weight(self, model: Model) -> float:
        """A model's weight, which mergekit demands."""
        value = model.parameters.get("weight", self.shared.get("weight"))
        if value is None:
            raise UsageError(
                f"{model.base}{'+' if model.folder else ''}{model.folder} has no weight, and {self.method} has no default",
                where="models",
                hint="weight: 1.0",
            )
        if isinstance(value, bool):
            raise UsageError(f"weight is {value}, expected a number", where="models")
        return float(value)

    def weights(self) -> list[float]:
        """Those of the adapters."""
        return [self.weight(m) for m in self.adapters]

    def flag(self, key: str, default: bool) -> bool:
        """A switch of the whole recipe; mergekit takes none from a single model."""
        self._only_shared(key)
        value = self.shared.get(key, default)
        if value not in (True, False):
            raise UsageError(f"{key} is {value!r}, expected true or false", where="parameters")
        return bool(value)

    def number(self, key: str, default: float | None) -> float:
        """A number of the whole recipe, required where `default` is None."""
        self._only_shared(key)
        value = self.shared.get(key, default)
        if value is None:
            raise UsageError(f"{self.method} needs {key}", where="parameters")
        return float(value)

    def common(self, key: str, default: float) -> float:
        """A number per model, which must be one for all."""
        values = {float(m.parameters.get(key, self.shared.get(key, default))) for m in self.adapters}
        if len(values) > 1:
            shown = ", ".join(f"{v:g}" for v in sorted(values))
            raise UsageError(f"{key} differs between the models: {shown}", where="models", hint="one for all")
        return values.pop()

    def _only_shared(self, key: str) -> None:
        if any(key in m.parameters for m in self.models):
            raise UsageError(
                f"{key} stands under a model, where mergekit passes over it",
                where="models",
                hint="parameters of the recipe",
            )


@dataclass(frozen=True, slots=True)
class MergekitMethod:
    """One of mergekit's methods.

    Args:
        meaning: The recipe -> method, options, weights and scale of plait's.
        needs_base: Whether mergekit stops without a base_model.
        parameters: Those it reads, wherever they stand.
    """

    meaning: Callable[[MergekitRecipe], MergeSpec]
    needs_base: bool
    parameters: tuple[str, ...]


def _said(method: str, weights: list[float], options: dict[str, Any] | None = None, scale: float = 1.0) -> MergeSpec:
    return MergeSpec(method, options or {}, weights, scale=scale)


def _linear(recipe: MergekitRecipe) -> MergeSpec:
    """The mean of whole weights: a base that is listed, or only named as base_model, counts with its own weight."""
    weights = recipe.weights()
    total = sum(weights) + sum(recipe.weight(m) for m in recipe.models if not m.folder)
    if recipe.base_model and all(m.folder for m in recipe.models):
        total += recipe.weight(Model(recipe.base_model, "", {}))
    if recipe.flag("normalize", True):
        if abs(total) < _EXACT:
            raise UsageError("the weights sum to zero, and linear divides by their sum", where="models")
        return _said("task_arithmetic", [w / total for w in weights])
    if abs(total - 1) > _EXACT:
        raise UsageError(
            f"linear without normalize adds whole weights up, base included: with a sum of {total:g} the base itself changes",
            where="parameters",
            hint="weights whose sum is 1, or task_arithmetic, which adds the updates up",
        )
    return _said("task_arithmetic", weights)


def _sparse(
    drop: str, *, rescale: bool = False, elect: bool = False, normalise: bool = False
) -> Callable[[MergekitRecipe], MergeSpec]:
    def meaning(recipe: MergekitRecipe) -> MergeSpec:
        recipe.flag("int8_mask", False)
        density = recipe.common("density", 1.0)
        options: dict[str, Any] = {
            "rescale": recipe.flag("rescale", rescale),
            "elect": elect,
            "normalise": recipe.flag("normalize", normalise),
        }
        scale = recipe.number("lambda", 1.0)
        if drop == "none" or density >= 1:
            if not elect and not options["normalise"]:
                return _said("task_arithmetic", recipe.weights(), scale=scale)
            return _said("sparse_arithmetic", recipe.weights(), options, scale)
        if density <= 0:
            raise UsageError(f"density is {density:g}: nothing is left", where="parameters", hint="above 0")
        options |= {"drop": drop, "density": density}
        options |= {"gamma": recipe.common("gamma", 0.01)} if drop == "outliers" else {}
        options |= {"epsilon": recipe.common("epsilon", 0.15)} if drop == "ranked" else {}
        return _said("sparse_arithmetic", recipe.weights(), options, scale)

    return meaning


def _sce(recipe: MergekitRecipe) -> MergeSpec:
    recipe.flag("int8_mask", False)
    density = min(1.0, recipe.number("select_topk", 1.0))
    if density <= 0:
        raise UsageError(f"select_topk is {density:g}: nothing is left", where="parameters", hint="above 0")
    return _said("sce", [1.0] * len(recipe.adapters), {"density": density, "details": "mergekit"})


def _nuslerp(recipe: MergekitRecipe) -> MergeSpec:
    if recipe.base_model is None:
        _refuse_whole(recipe)
    if not recipe.flag("nuslerp_flatten", True):
        raise UsageError("nuslerp_flatten: false walks row by row, which plait does not do", where="parameters")
    recipe.flag("nuslerp_row_wise", False)  # read only where nothing is flattened
    weights = recipe.weights()
    if len(weights) != 2:
        raise UsageError(f"nuslerp joins two models, not {len(weights)}", where="models")
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    if not 0 <= t <= 1:
        raise UsageError(f"weights {weights} lie beyond the ends of the arc (t = {t:g})", where="models")
    return _said("slerp", [1.0, 1.0], {"t": t})


def _multislerp(recipe: MergekitRecipe) -> MergeSpec:
    if recipe.base_model is None:
        _refuse_whole(recipe)
    if recipe.number("eps", 1e-8) != 1e-8:
        raise UsageError("plait has nothing like eps of multislerp", where="parameters", hint="leave it out")
    weights = recipe.weights()
    if len(weights) > 2:
        raise UsageError(
            "multislerp of more than two adapters stops in mergekit at every weight that none of them changes",
            where="models",
            hint="the folders themselves with --method multi_slerp --set tangent=projected",
        )
    if not recipe.flag("normalize_weights", True) and abs(sum(weights) - 1) > _EXACT:
        raise UsageError(
            "multislerp takes weights whose sum is 1, or normalises them",
            where="parameters",
            hint="normalize_weights: true",
        )
    return _said("multi_slerp", weights, {"tangent": "projected"})


def _refuse_whole(recipe: MergekitRecipe) -> NoReturn:
    """Walks between whole weights: with W0 in the angle, the result is no sum of the updates, and not of low rank."""
    instead = {"multislerp": "multi_slerp", "nuslerp": "slerp"}.get(recipe.method, recipe.method)
    way = (
        "base_model: the base, which walks between the updates; or "
        if recipe.method in ("multislerp", "nuslerp")
        else ""
    )
    raise UsageError(
        f"{recipe.method} walks between whole weights in mergekit, which no merge of adapters is",
        where="merge_method",
        hint=f"{way}the folders themselves with --method {instead}, which walks between their updates",
    )


def refuse_end(method: str, base_model: str) -> NoReturn:
    """Refuse a recipe whose base_model is one of its own models, an adapter in its base.

    slerp begins its walk at that whole model; the methods of updates count them from it.

    Raises:
        UsageError: Always.
    """
    if method in ("slerp", "karcher"):
        raise UsageError(
            f"{method} walks between whole weights in mergekit, from its base_model {base_model!r} to the other model, "
            "which no merge of adapters does",
            where="merge_method",
            hint=f"the folders themselves with --method {method}, which walks between their updates",
        )
    if method == "linear":
        hint = "leave base_model out: linear takes the mean of the models without it"
    else:
        hint = "base_model: the base alone; updates from the middle of another model are no adapters of the base"
    raise UsageError(f"base_model {base_model!r} is one of the models, not the base", where="base_model", hint=hint)


_GTA = ("weight", "density", "normalize", "rescale", "int8_mask", "lambda")
METHODS = {
    "linear": MergekitMethod(_linear, False, ("weight", "normalize")),
    "task_arithmetic": MergekitMethod(_sparse("none"), True, _GTA),
    "ties": MergekitMethod(_sparse("small", elect=True, normalise=True), True, _GTA),
    "dare_linear": MergekitMethod(_sparse("random", rescale=True), True, _GTA),
    "dare_ties": MergekitMethod(_sparse("random", rescale=True, elect=True), True, _GTA),
    "breadcrumbs": MergekitMethod(_sparse("outliers"), True, (*_GTA, "gamma")),
    "breadcrumbs_ties": MergekitMethod(_sparse("outliers", elect=True), True, (*_GTA, "gamma")),
    "della": MergekitMethod(_sparse("ranked", rescale=True, elect=True, normalise=True), True, (*_GTA, "epsilon")),
    "della_linear": MergekitMethod(_sparse("ranked", rescale=True), True, (*_GTA, "epsilon")),
    "sce": MergekitMethod(_sce, True, ("select_topk", "int8_mask")),
    "nuslerp": MergekitMethod(_nuslerp, False, ("weight", "nuslerp_row_wise", "nuslerp_flatten")),
    "multislerp": MergekitMethod(_multislerp, False, ("weight", "normalize_weights", "eps")),
    "slerp": MergekitMethod(_refuse_whole, False, ("t",)),
    "karcher": MergekitMethod(_refuse_whole, False, ("max_iter", "tol")),
}
