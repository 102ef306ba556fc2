r"""Rounds of train and merge, and moments taken anew halfway, where every answer is written: the study of text_arms.py, at equal steps.

    python benchmarks/text_rounds.py --study recipes/studies/text-qwen15.yaml --set base.model=MODEL --set data.root=TASKS --out RUN \
        --general DATA/glue/mrpc/train.parquet:sentence1 --seed 1

What benchmarks/rounds.py does on an encoder, with the study's starts, rows, rate, penalty and stacked training. `rounds` (PEFT's default
start) and `rounds_penalised` (contrastive start, beta 1) train a quarter of the steps for all tasks, merge by task arithmetic at the
rule's scale, and go on from a base that wears the sum of the merges, with the first factors anew, four times; what is scored is the sum of
the four merges, and as *alone* each task's adapter with the first three. Moments are those of the bare base in every round, as there.
`refreshed` (contrastive start, beta 1) trains half of the steps, takes every task's moments with its own adapter on, and trains on with
these in the penalty; `restarted` is interrupted alike and keeps the old ones; both go on from one first half. Every part begins with a new
AdamW and goes on in the one schedule and order of rows.

The merges that a base wears are not rounded into its weights of 16 bits, where much of them would be lost: they run beside its layers as
one adapter, in the same arithmetic that scores them later. No label has a say in a merge.

RUN/records/rounds-SEED-ARM.json is written as each arm ends, and what is there is not done again; after --seconds no arm is begun.
benchmarks/text_page.py makes the page.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rounds import added, by_rule, moments
from text_arms import MOMENTS, RULE, Run, Worn, begin, general_shift, say, scored, unit_of

from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.errors import UsageError
from plait.merging.scales import reach_of, scale_by_moments
from plait.model.base import BaseModel
from plait.model.rowbank import step_plan
from plait.model.stacked import stacked_factors, stacked_updates
from plait.runs.pending import pending
from plait.runs.stages import do, splits
from plait.runs.trainings import members_of
from plait.statistics import Statistics
from plait.training import Member
from plait.training.batched import BatchedAdapters, Prepared, step_items
from plait.training.fleet_run import Shared, members_at_once

MERGE = "task_arithmetic"
NAMED = {RULE: f"{MERGE}, by rule", MOMENTS: MERGE}  # as text_arms.py names them


@dataclass(frozen=True, slots=True)
class Way:
    """How an arm is trained.

    Args:
        arm: Arm of the study whose start and constraint it has.
        parts: Parts of equal length.
        merges: Whether what is trained is merged into the base after each part.
        refreshes: Whether moments are taken anew between parts.
    """

    arm: str
    parts: int
    merges: bool = False
    refreshes: bool = False


ARMS: Mapping[str, Way] = {
    "rounds": Way("kaiming", 4, merges=True),
    "rounds_penalised": Way("contrastive_penalised", 4, merges=True),
    "restarted": Way("contrastive_penalised", 2),
    "refreshed": Way("contrastive_penalised", 2, refreshes=True),
}


@dataclass(frozen=True, slots=True)
class Ended:
    """What an arm ends with.

    Args:
        own: Task -> what its adapter computes, with the merges that the base wore.
        merges: Name -> merge and its scale, as it is scored.
        scales: Name -> the scale at which adapters were merged.
    """

    own: Mapping[str, Adapter]
    merges: Mapping[str, Worn]
    scales: Mapping[str, float]


class Fleet:
    """Members that are trained together, part by part of their one schedule and order of rows.

    Args:
        members: Their settings say all steps, and none draws scales.
        base: The base model.
        parts: Equal parts of the steps.

    Raises:
        UsageError: Fewer steps than parts.
    """

    def __init__(self, members: Sequence[Member], base: BaseModel, parts: int) -> None:
        steps = members[0].settings.total_steps(len(members[0].examples))
        if steps < parts:
            raise UsageError(f"{plural(steps, 'step')} in {parts} parts", where="training.steps")
        self.parts, self.names, self.shared = parts, [m.task.name for m in members], Shared(members, base)
        order, size = self.shared.by_length(), members_at_once(self.shared)
        self.groups = [self._prepared(order[start : start + size]) for start in range(0, len(order), size)]

    def _prepared(self, chosen: list[int]) -> tuple[list[int], Sequence[Prepared]]:
        batched, order = self.shared.batched(chosen)
        return order, batched.prepared

    def trained(
        self, part: int, starts: Mapping[str, Adapter] | None = None, worn: Adapter | None = None
    ) -> dict[str, Adapter]:
        """Train one part, with a new AdamW.

        Args:
            part: From 0.
            starts: Task -> adapter of this method; None for the members' own first factors.
            worn: What the base wears meanwhile, in the dtype in which answers are scored with it; modules named as in the backbone.

        Returns:
            Task -> adapter, without what is worn.
        """
        trained: dict[str, Adapter] = {}
        with stacked_updates(
            self.shared.backbone, stacked_factors(self.shared.backbone, [(worn, 1.0)]) if worn else {}
        ):
            for order, first in self.groups:
                prepared = [replace(t, adapter=starts[t.adapter.name]) for t in first] if starts else first
                while (some := self._where_memory_lasts(order, prepared, part)) is None:
                    if not self.shared.smaller_passes():
                        raise SystemExit("out of memory with one row of each adapter at a time")
                trained |= some
        return {name: trained[name] for name in self.names}

    def _where_memory_lasts(
        self, order: list[int], prepared: Sequence[Prepared], part: int
    ) -> dict[str, Adapter] | None:
        """Some members after the part; None where memory ran out, and what the steps held is let go of."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return self._stepped(order, prepared, part)
        gc.collect()
        torch.cuda.empty_cache()
        return None

    def _stepped(self, order: list[int], prepared: Sequence[Prepared], part: int) -> dict[str, Adapter]:
        shared, rows = self.shared, self.shared.rows_of(order)
        steps = slice(len(rows) * part // self.parts, len(rows) * (part + 1) // self.parts)
        batched = BatchedAdapters(prepared, shared.backbone, shared.ends, shared.whole, shared.shapes, shared.autocast)
        rows, batched.rates = rows[steps], batched.rates[steps]  # AdamW counts from the part's first step
        plan = step_plan(shared.bank, rows, shared.device, shared.prices, multiple=shared.multiple)
        items = step_items(shared.bank, rows, shared.kind, shared.device)
        losses = torch.stack([batched.step(i, shared.bank, plan, items[i]) for i in range(len(rows))])
        values = batched.parameters.values.cpu()
        if not (losses.isfinite().all() and values.isfinite().all()):
            raise SystemExit(f"a loss, or what is trained, left the numbers in part {part + 1} of {self.parts}")
        return {t.adapter.name: batched.adapter_of(i, values[i]) for i, t in enumerate(prepared)}

    def release(self) -> None:
        """Let the device's memory go."""
        self.groups = []
        self.shared.release()


def run_arm(run: Run, way: Way, seed: int, begun: dict[tuple[str, int], dict[str, Adapter]]) -> Ended:
    """Train an arm and merge it.

    Args:
        run: The run.
        way: How.
        seed: Of rows and starts.
        begun: (arm of the study, parts) -> what its first part ended with, for arms that begin alike; filled here.
    """
    layout = run.layout
    session, unit = layout.session, unit_of(run, seed, way.arm)
    if todo := pending(layout, [layout.statistics_unit(unit)]):
        do(todo, layout)
    members, known, fleet = members_of(unit, layout), begun.get((way.arm, way.parts)), None
    adapters, starts, before, carried, scale = dict[str, Adapter](), None, None, None, float("nan")
    first_moments = members[0].statistics
    for part in range(way.parts):
        started = time.time()
        if part == 0 and known:
            adapters = known
            say(f"  part 1 of {way.parts} is there")
        else:
            fleet = fleet or Fleet(members, session.base, way.parts)
            adapters = fleet.trained(part, starts, carried)
            say(f"  part {part + 1} of {way.parts}: {time.time() - started:.0f} s")
        begun.setdefault((way.arm, way.parts), adapters)
        if way.merges:  # new factors on a base that wears the merges so far
            made, scale = by_rule(adapters, run.device)
            before, carried = carried, added(carried, made, scale)
        else:
            starts = adapters
        if way.refreshes and part < way.parts - 1:
            if fleet:
                fleet.release()
            fleet = None
            fresh: Mapping[str, Statistics] = moments(session, seed, adapters)
            members = [replace(m, statistics=fresh) for m in members]
            say(f"  moments anew: {time.time() - started:.0f} s since the part began")
    if fleet:
        fleet.release()
    if carried is not None:
        own = {t: added(before, a) for t, a in adapters.items()}
        return Ended(own, {NAMED[RULE]: (carried, 1.0)}, {NAMED[RULE]: scale})
    made, scale = by_rule(adapters, run.device)
    assert first_moments is not None  # the arm is penalised
    by_moments = scale_by_moments(list(adapters.values()), made.modules, first_moments, reach_of(MERGE, None))
    scales = {NAMED[RULE]: scale} | ({NAMED[MOMENTS]: by_moments.value} if by_moments else {})
    return Ended(adapters, {n: (made, s) for n, s in scales.items()}, scales)


def record_of(run: Run, seed: int, arm: str, begun: dict[tuple[str, int], dict[str, Adapter]]) -> dict[str, Any]:
    """Train, merge, and score on the rows of `fixed`: own adapters, merges, the bare base."""
    started = time.time()
    ended = run_arm(run, ARMS[arm], seed, begun)
    trained, worn = time.time() - started, list(ended.merges.values())
    rows = {t: {h: r[: run.rows] for h, r in s.halves.items()} for t, s in splits(run.layout).items()}
    table = scored(run, lambda t: [(ended.own[t], 1.0), *worn, (None, 0.0)], rows, f"rounds-{seed}-{arm}")
    shifts = general_shift(run, ended.own, [*((a, 1.0) for a in ended.own.values()), *worn])
    return {
        "tasks": list(ended.own),
        "alone": table[0].round(3).tolist(),
        "floor": table[-1].round(3).tolist(),
        "merges": {
            n: {
                "scale": ended.scales[n],
                "scores": table[1 + i].round(3).tolist(),
                "general_kl": shifts[len(ended.own) + i],
            }
            for i, n in enumerate(ended.merges)
        },
        "general_kl_alone": dict(zip(ended.own, shifts, strict=False)),
        "seconds_trained": round(trained, 3),
        "seconds": round(time.time() - started, 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", required=True, type=Path)
    p.add_argument("--set", action="append", default=[], help="KEY=VALUE of the study")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--condition", choices=["told", "bare"], default="told")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--arms", default=",".join(ARMS), help="in their order")
    p.add_argument("--rows", type=int, default=120)
    p.add_argument("--general", required=True, help="FILE:COLUMN")
    p.add_argument("--general-rows", type=int, default=200)
    p.add_argument("--tokens", type=int, default=350_000, help="keys and values held at once on a GPU")
    p.add_argument("--memory", type=float, default=1.0, help="share of the GPU's memory that may be taken")
    p.add_argument("--seconds", type=float, default=float("inf"))
    a = p.parse_args(arguments)
    started, run = time.time(), begin(a)
    begun: dict[tuple[str, int], dict[str, Adapter]] = {}
    for arm in a.arms.split(","):
        file = a.out / "records" / f"rounds-{a.seed}-{arm}.json"
        if file.exists():
            continue
        if time.time() - started > a.seconds:
            return say(f"time is up before {file.stem}")
        say(arm)
        run.layout.session.load()
        record = record_of(run, a.seed, arm, begun)
        file.with_suffix(".part").write_text(json.dumps(record) + "\n")
        file.with_suffix(".part").rename(file)
        say(f"{file.stem} in {record['seconds']:.0f} s, {record['seconds_trained']:.0f} of them trained")
    return say("all is done")


if __name__ == "__main__":
    main()
