"""FeatCal in low rank: a merge fitted again, front to back, to what the adapters put out. Needs the base and inputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.adapters.lora import LINEAR, Adapter, LoraFactors
from plait.adapters.one_thread import in_one_thread
from plait.errors import InputError, RunError, UsageError
from plait.merging.align import assembled
from plait.merging.methods.linear import importances
from plait.merging.metric import cut_solution
from plait.merging.plan import Plan
from plait.merging.planning import plan_merge
from plait.merging.record import Merged
from plait.model.applied import update_of
from plait.model.hooks import Change, modules_named
from plait.model.resuming import Resuming
from plait.model.running import Stage, real_rows, run_until, stages_of

Batch = Mapping[str, Tensor]
# How far the anchor and the result are stretched, as powers of the number of adapters: measured with eight (2 and 1.3).
_REACH, _SCALE = 1 / 3, 1 / 8


def featcal(
    adapters: Sequence[Adapter],
    model: nn.Module,
    forward: Callable[[str, Batch], Any],
    batches: Mapping[str, Sequence[Batch]],
    *,
    modules: Mapping[str, nn.Module] | None = None,
    start: Adapter | None = None,
    anchor: str = "tsv",
    own: float = 1.0,
    pull: float = 0.01,
    reach: float | None = None,
    scale: float | None = None,
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    base: str | None = None,
    name: str = "merged",
) -> Merged:
    """Fit every layer, front to back, to the adapters' own outputs, given the inputs that the layers fitted so far produce.

    For the layers that read one tensor, x_s is that tensor in the model with the fitted layers below, x_t the same in task t's own
    model, and the target is what t's layer puts out beyond the base's layer on x_s:

        y_t = (1 - own) D_t x_s + own (W_0 (x_t - x_s) + D_t x_t)
        D = [sum_t w_t E(y_t x_s^T) / n_t + pull reach D_a] [sum_t w_t E(x_s x_s^T) / n_t + pull I]^-1,  n_t = |E x_s x_s^T|_F

    so that what the layers below have lost is made good by the next one. D has full rank; it is cut to the rank of the sum in the
    metric of the inputs (`cut_solution`): the outputs stay nearest, not the weights. One adapter comes back.

    Args:
        adapters: At least one, of linear layers.
        model: The base; its modules are found by name, and it is left as it was.
        forward: (task, batch) -> anything; must run `model` on the batch.
        batches: Task -> batches; where one has an ``attention_mask``, padding is left out.
        modules: The adapted modules themselves; by default found in the model by the ends of their names.
        start: D_a, a merge of the same adapters with its scale folded in; by default the method `anchor` at its default scale.
        anchor: Name of a method without statistics.
        own: What the target takes of the adapter's own inputs, in [0, 1].
        pull: How strongly D is pulled towards reach D_a where the inputs say little, above 0.
        reach: By default T^(1/3) for T adapters.
        scale: Factor of the whole result: a fit to conflicting targets is too short; by default T^(1/8).
        rank: By default the sum of the adapters' ranks.
        weights: w_t, none negative; 1 each by default.
        base: Base id of the result where the adapters name one base by different names.
        name: Name of the result.

    Raises:
        UsageError: No batches for a task, or modules the model does not have or never runs.
        InputError: Modules that are no linear layers.
        RunError: A system that is singular or not finite.

    Cost:
        For each tensor that adapted layers read, two forward passes of every batch through one block, from what the block before it
        put out (kept for every batch); in models whose blocks do not simply follow one another, half a model deep. One Cholesky
        factorisation of (d, d) each and an eigen-decomposition of (out, out) a layer.
    Source: FeatCal, 2026 (arXiv:2605.13030), its linear layers; IterIS, CVPR 2025 (arXiv:2411.15231) is own = 1 without an anchor.
    **Deviates**: the update has low rank, and is cut in the metric of the inputs; biases and LayerNorms stay; layers that read
    one tensor are fitted together, each after those below it (the authors: a whole block at once); own is 1 and not 0.25, which
    kept 0.13 less of eight adapters here, and the result is scaled. The last block's tokens all count alike.
    """
    if (own and not 0 < own <= 1) or pull <= 0:
        raise UsageError(f"own is {own:g} and pull {pull:g}, expected a number in [0, 1] and one above 0")
    plan = plan_merge(adapters, anchor, weights=weights, base=base)
    _require_fit(plan, batches)
    adapters, tasks = plan.adapters, sum(w != 0.0 for w in plan.weights)
    reach = tasks**_REACH if reach is None else reach
    scale = tasks**_SCALE if scale is None else scale
    anchored = start or plan.run(name).adapter
    modules = modules or modules_named(model, list(plan.common.modules))

    # Front to back: what a stage reads is put out by the stages below it, as they have been fitted.
    passes = _Passes(Resuming.of(model, modules), Resuming.of(model, modules))
    fitted: dict[str, LoraFactors] = {}
    lost: dict[str, float] = {}
    for stage in stages_of(modules, lambda: forward(adapters[0].name, batches[adapters[0].name][0])):
        teachers = [_Teacher(adapter, stage, modules, fitted, own, passes) for adapter in adapters]
        sums = (
            t.sums(partial(forward, t.adapter.name), batches[t.adapter.name]) for t in teachers
        )  # one is held at a time
        total = reduce(_Sums.__add__, (one.normalised(w) for one, w in zip(sums, plan.weights, strict=True)))
        for module, (factors, gone) in _solved(total, plan, anchored, pull, reach, rank).items():
            fitted[module], lost[module] = factors, gone

    scaled = {m: replace(fitted[m], B=fitted[m].B * scale) for m in plan.common.modules}
    record = replace(
        plan.record(scaled, {m: lost[m] for m in scaled}),
        method="featcal",
        options={"anchor": anchor if start is None else start.name, "own": own, "pull": pull, "reach": reach},
        scale=scale,
        scale_reason="",
    )
    return Merged(assembled(name, plan.common, adapters, scaled), record)


def _require_fit(plan: Plan, batches: Mapping[str, Sequence[Batch]]) -> None:
    """Refuse weights below zero, adapters without batches, and updates of other than linear layers."""
    importances(plan.weights)
    if lacking := [a.name for a in plan.adapters if not batches.get(a.name)]:
        raise UsageError(f"no batches for {', '.join(lacking)}")
    if odd := next((m for m, (_, kind) in plan.common.modules.items() if kind != LINEAR), None):
        raise InputError("featcal fits linear layers only", where=odd)


@dataclass(frozen=True, slots=True)
class _Sums:
    """E x x^T of one tensor, and E y x^T of every layer that reads it; float64, up to one factor.

    Args:
        second: (d, d).
        targets: Layer -> (out, d).
    """

    second: Float[Tensor, "d d"]
    targets: Mapping[str, Float[Tensor, "out d"]]

    def normalised(self, weight: float) -> _Sums:
        """Divide by the Frobenius norm of the second moment, times a weight."""
        size = float(self.second.norm())
        factor = weight / size if size > 0 else 0.0
        return _Sums(self.second * factor, {m: y * factor for m, y in self.targets.items()})

    def __add__(self, other: _Sums) -> _Sums:
        """Add up two."""
        return _Sums(self.second + other.second, {m: y + other.targets[m] for m, y in self.targets.items()})


@dataclass(frozen=True, slots=True)
class _Passes:
    """Where passes begin: those of the adapters' own models, and those of the model that is being fitted."""

    told: Resuming
    seen: Resuming


@dataclass(frozen=True, slots=True)
class _Teacher:
    """One adapter at one stage, its outputs to be followed.

    Args:
        adapter: The adapter.
        stage: Layers that read one tensor.
        modules: All adapted modules of the model.
        fitted: Those below that are fitted already.
        own: What the target takes of the adapter's own inputs.
        passes: Where they begin.
    """

    adapter: Adapter
    stage: Stage
    modules: Mapping[str, nn.Module]
    fitted: Mapping[str, LoraFactors]
    own: float
    passes: _Passes

    def sums(self, forward: Callable[[Batch], Any], batches: Sequence[Batch]) -> _Sums:
        """The moments over all batches."""
        device = next(next(iter(self.modules.values())).parameters()).device
        mine = {m: f.folded(device=device) for m, f in self.adapter.modules.items()}
        theirs = {m: update_of(f, m) for m, f in mine.items()}
        below = {m: update_of(f.folded(device=device), m) for m, f in self.fitted.items()}
        second: Tensor | None = None
        targets: dict[str, Tensor] = {}
        self._checked(below, forward, batches[0])
        for n, batch in enumerate(batches):
            key = (self.adapter.name, n)
            told = self._rows(theirs, theirs, forward, batch, self.passes.told, key) if self.own else {}
            seen = self._rows(below, {}, forward, batch, self.passes.seen, key)
            for x in (x for x, _ in seen[self.stage.modules[0]]):  # which all layers of the stage read
                gram = (x.T @ x).double()
                second = gram if second is None else second + gram
            for m in self.stage.modules:
                for call, (x, bare) in enumerate(seen[m]):
                    y = self._target(mine.get(m), x, bare, told[m][call][1] if self.own else None)
                    targets[m] = targets.get(m, 0.0) + (y.T @ x).double()
        if second is None or not bool(torch.isfinite(second).all()):
            raise RunError("the layer's inputs are not finite", where=f"{self.adapter.name}: {self.stage.modules[0]}")
        return _Sums(second, targets)

    def _target(self, update: LoraFactors | None, x: Tensor, bare: Tensor, told: Tensor | None) -> Tensor:
        """y_t of `featcal`: what the layer is to put out beyond the base's on x, an interpolation of two answers of the adapter.

        Args:
            update: The adapter's own, scaling folded in; None where it does not adapt the layer.
            x: (n, in), the layer's inputs in the model that is being fitted.
            bare: (n, out), what the base's layer puts out on them.
            told: (n, out), what the adapter's own model puts out there; None where `own` is 0.
        """
        here = torch.zeros_like(bare) if update is None else (x @ update.A.T) @ update.B.T
        return here if told is None else here + self.own * (told - bare - here)

    def _checked(self, below: Mapping[str, Change], forward: Callable[[Batch], Any], batch: Batch) -> None:
        """Run one example from the start too: where that gives other inputs, blocks do not simply follow one another."""
        size = next(v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim)
        one = {k: v[:1] if isinstance(v, Tensor) and v.ndim and v.shape[0] == size else v for k, v in batch.items()}
        resumed = self._rows(below, {}, forward, one, self.passes.seen, (self.adapter.name, "one"))
        whole = self._rows(below, {}, forward, one, Resuming(), "")
        pairs = zip(_inputs(resumed), _inputs(whole), strict=False)
        if not all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in pairs):
            self.passes.told.stop()
            self.passes.seen.stop()

    def _rows(
        self,
        changes: Mapping[str, Change],
        here: Mapping[str, Change],
        forward: Callable[[Batch], Any],
        batch: Batch,
        begun: Resuming,
        key: Hashable,
    ) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Per layer of the stage, and call, its real inputs and what it puts out: with `changes` below and `here` in it."""
        rows: dict[str, list[tuple[Tensor, Tensor]]] = {m: [] for m in self.stage.modules}
        mask = batch.get("attention_mask")

        def note(module: str) -> Change:
            def take(x: Tensor, output: Tensor) -> Tensor:
                output = here[module](x, output) if module in here else output
                rows[module].append((real_rows(x, mask).float(), real_rows(output, mask).float()))
                return output

            return take

        watched = {**changes, **{m: note(m) for m in self.stage.modules}}
        with begun.at(key, self.stage.modules):
            run_until(self.stage, self.modules, watched, lambda: forward(batch))
        return rows


def _inputs(rows: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> list[Tensor]:
    """What the layers of a stage read, call by call."""
    return [x for calls in rows.values() for x, _ in calls]


def _solved(
    sums: _Sums, plan: Plan, anchored: Adapter, pull: float, reach: float, rank: int | None
) -> dict[str, tuple[LoraFactors, float]]:
    """The stage's layers: the regression, pulled to the anchor, cut to rank; and what the cut took."""
    system = sums.second.clone()
    system.diagonal().add_(pull)
    factor, failed = in_one_thread(torch.linalg.cholesky_ex, system)
    if bool(failed):
        raise RunError("the second moment is not positive", where=next(iter(sums.targets)), hint="a larger pull")
    solved = {}
    for module, target in sums.targets.items():
        anchor = anchored.modules[module].folded(torch.float64, system.device)
        right = target + pull * reach * (anchor.B @ anchor.A)
        solution = torch.cholesky_solve(right.T, factor).T
        most = sum(a.modules[module].rank for a in plan.adapters if module in a.modules)
        solved[module] = cut_solution(solution, right, rank or max(1, min(most, *solution.shape)))
    return solved
