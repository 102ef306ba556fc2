r"""Arms of a study on tasks whose answers are written, merged as fixed beforehand, without a label: own share, scales, price outside.

    python benchmarks/text_tasks.py --data DATA --to TASKS
    python benchmarks/text_arms.py --study recipes/studies/text-qwen15.yaml --set base.model=MODEL --set data.root=TASKS --out RUN \
        --general DATA/glue/mrpc/train.parquet:sentence1 --do "train:0 fixed:0 curves:0"

`--condition bare` gives every task the prompts without an instruction, in a RUN of its own. `train:SEED[:ARM,ARM]` trains arms, every one
at its first rate, as one fleet. `fixed:SEED[:ARM]` scores each adapter alone, the bare base and the merges of `FIXED` (of the plain
arm also `FIXED_OF_PLAIN`) at scales that no label has chosen, on `--rows` validation rows of each half; of an arm trained on all
tasks together, its one adapter. `price:SEED[:ARM]` scores adapters and merges of `FIXED` on tasks that nobody trained (`--elsewhere
STUDY.yaml:TASK,TASK`) and takes the perplexity of the general texts (benchmarks/text_price.py). `curves:SEED[:ARM]` scores merges over a
ladder of scales on the grid rows of each half. Several processes may score arms of one RUN at once: writing waits for the host more than
for the GPU. What RUN holds is not done again; after `--seconds` nothing new is begun. RUN/records/*.json hold the scores,
RUN/answers/*.npz what was measured of every answer; benchmarks/text_page.py makes the page, benchmarks/scales.py the table of scales.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from text_price import Elsewhere, elsewhere_of, price

from plait.adapters.lora import Adapter
from plait.evaluation import writing
from plait.evaluation.features import task_vector_norm
from plait.evaluation.fleet import Candidate, predict_many
from plait.evaluation.splits import HALVES
from plait.fidelity.language import text_general
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.texts import read_place
from plait.merging import merge
from plait.merging.registry import find_method
from plait.merging.scales import reach_of, scale_by_moments, scale_by_rule
from plait.recipes.recipe_file import read_recipe
from plait.runs.layout import Layout
from plait.runs.pending import pending
from plait.runs.sources import adapters_of, statistics_of
from plait.runs.stages import do, splits
from plait.runs.units import ALONE, MERGE, TRAIN, Unit
from plait.tasks import primary, scores

RULE, MOMENTS = "rule", "moments"
# Name -> method, calibration, scale: by the rule for the number of adapters, by second moments, or a number.
FIXED: Mapping[str, tuple[str, str | None, str | float]] = {
    "task_arithmetic": ("task_arithmetic", None, MOMENTS),
    "task_arithmetic, by rule": ("task_arithmetic", None, RULE),
    "task_arithmetic at 1": ("task_arithmetic", None, 1.0),
    "tsv": ("tsv", None, RULE),
    "regmean": ("regmean", None, MOMENTS),
    "task_arithmetic + pico": ("task_arithmetic", "pico", MOMENTS),
}
# What people have: adapters trained the plain way. The prompt's defaults of other methods, and TSV-M's where statistics are given.
FIXED_OF_PLAIN: Mapping[str, tuple[str, str | None, str | float]] = {
    "tsv, by moments": ("tsv", None, MOMENTS),
    **{m: (m, None, RULE) for m in ("ties", "dare_ties", "knots", "iso_c", "core_space")},
}
LADDER = tuple(2 ** (k / 2) for k in range(-2, 4))  # times the rule's scale
PLAIN = "kaiming"
UNKEPT = (2, 3)  # columns of likelihoods in what is measured of an answer: 0 where nobody asks for them
CURVES = (("task_arithmetic", None), ("tsv", None), ("regmean", None), ("task_arithmetic", "pico"))
CURVES_OF_PLAIN = (
    *CURVES,
    *((m, None) for m in ("ties", "dare_ties", "knots", "iso_c", "core_space", "least_squares")),
)
# What needs nothing but the adapters and was not scored at this size, beside the default of eight and more that write.
NODATA = (("iso_c", None), ("iso_cts", None), ("wudi", None), ("swudi", None), ("core_space, isotropic", None))
OPTIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {"core_space, isotropic": ("core_space", {"isotropic": True})}


@dataclass(frozen=True, slots=True)
class Run:
    """What all parts of a run share.

    Args:
        layout: Of the study.
        out: The run's folder.
        rows: Reported rows of each half.
        general: Texts of no task.
        device: Where merges are computed.
        few: Whether the plain arm too has the merges of `FIXED` alone.
    """

    layout: Layout
    out: Path
    rows: int
    general: Sequence[tuple[str, ...]]
    device: str
    few: bool = False


def label(method: str, calibration: str | None) -> str:
    """What a table calls a merge."""
    return method + (f" + {calibration}" if calibration else "")


def unit_of(run: Run, seed: int, arm: str) -> Unit:
    """The training of an arm."""
    return Unit(TRAIN, seed, arm, (run.layout.recipe.arm(arm).rates or run.layout.recipe.rates)[0])


def arm_seeds(run: Run, arm: str) -> Sequence[int]:
    """The seeds of an arm: its own, or the study's."""
    return run.layout.recipe.arm(arm).seeds or run.layout.recipe.seeds


def trained(run: Run, seed: int, arms: Sequence[str]) -> None:
    """Statistics and adapters of some arms of a seed, those that are missing."""
    units = [unit_of(run, seed, a) for a in arms]
    for wave in (
        [
            s
            for u in units
            for s in (run.layout.statistics_unit(u), run.layout.statistics_unit(replace(u, stage=MERGE)))
        ],
        units,
    ):
        if todo := pending(run.layout, list(dict.fromkeys(wave))):
            started = time.time()
            do(todo, run.layout)
            say(f"{len(todo)} of {todo[0].stage}, seed {seed}: {time.time() - started:.0f} s")


class Merger:
    """Merges of one arm and seed at scale 1, each computed once, and their scales without labels."""

    def __init__(self, run: Run, seed: int, arm: str) -> None:
        unit = replace(unit_of(run, seed, arm), stage=ALONE)
        self.adapters = adapters_of(unit, run.layout)
        self.statistics = statistics_of(replace(unit, stage=MERGE), run.layout)[0]
        self.device, self.seed = run.device, seed
        self._made: dict[tuple[str, str | None], Adapter] = {}

    def made(self, method: str, calibration: str | None) -> Adapter:
        """The merge at scale 1."""
        key = (method, calibration)
        if key not in self._made:
            started = time.time()
            method, options = OPTIONS.get(method, (method, {}))
            statistics = self.statistics if find_method(method).needs else None
            self._made[key] = merge(
                list(self.adapters.values()), method, scale=1.0, calibrate=calibration, statistics=statistics,
                seed=self.seed, device=self.device, verify=False, options=options,
            ).adapter  # fmt: skip
            say(f"  merged by {label(*key)}: {time.time() - started:.1f} s")
        return self._made[key]

    def scale(self, method: str, calibration: str | None, how: str | float) -> float:
        """A scale by the rule, by moments, or as it is given."""
        if how == RULE:
            method = OPTIONS.get(method, (method, {}))[0]
            return scale_by_rule(method, calibration, (1.0,) * len(self.adapters)).value
        if how == MOMENTS:
            modules = self.made(method, calibration).modules
            reach = reach_of(method, calibration)
            scale = scale_by_moments(list(self.adapters.values()), modules, self.statistics, reach)
            return scale.value if scale else float("nan")
        return float(how)


Worn = tuple[Adapter | None, float]


def scored(
    run: Run, worn: Callable[[str], Sequence[Worn]], rows: Mapping[str, Mapping[str, Any]], file: str
) -> np.ndarray:
    """(worn, halves, tasks) scores in percent; what was measured of every answer is kept.

    Args:
        run: The run.
        worn: Task -> what answers it, equally many for every task.
        rows: Task -> half -> rows.
        file: Names the kept answers.
    """
    evaluator, kept, columns = run.layout.session.evaluator, {}, []
    for task, found in evaluator.tasks.items():
        started = time.time()
        parts = [rows[task][h] for h in HALVES]
        answers = predict_many(evaluator, task, [Candidate({}, a, s) for a, s in worn(task)], np.concatenate(parts))
        kept[task] = np.delete(np.stack(answers), UNKEPT, -1).astype(np.float16)
        cut = len(parts[0])
        labels = run.layout.labels(task)[np.concatenate(parts)]
        columns.append(
            [
                [primary(scores(found.metrics, one[part], labels[part])) for part in (slice(cut), slice(cut, None))]
                for one in answers
            ]
        )
        if run.device == "cuda":
            torch.cuda.empty_cache()  # for the others
        say(f"  {task}: {len(answers)} x {len(labels)} answers in {time.time() - started:.1f} s")
    (run.out / "answers").mkdir(exist_ok=True)
    np.savez_compressed(run.out / "answers" / f"{file}.npz", **kept)
    return np.array(columns).transpose(1, 2, 0)


def fixed(run: Run, seed: int, arm: str) -> dict[str, Any]:
    """Each adapter alone, the bare base, and the merges fixed beforehand."""
    merger, which = Merger(run, seed, arm), {**FIXED, **(FIXED_OF_PLAIN if arm == PLAIN and not run.few else {})}
    if run.layout.recipe.arm(arm).joint:
        which = {}
    scales = {n: merger.scale(m, c, how) for n, (m, c, how) in which.items()}
    merges: list[Worn] = [(merger.made(m, c), scales[n]) for n, (m, c, _) in which.items()]
    rows = {t: {h: r[: run.rows] for h, r in s.halves.items()} for t, s in splits(run.layout).items()}
    ends: list[Worn] = [(None, 0.0)] if arm == PLAIN else []  # the bare base is the same for all arms
    table = scored(run, lambda t: [(merger.adapters[t], 1.0), *merges, *ends], rows, f"fixed-{seed}-{arm}")
    shifts = general_shift(run, merger.adapters, [*((a, 1.0) for a in merger.adapters.values()), *merges])
    norms = {t: task_vector_norm(a) for t, a in merger.adapters.items()}
    return {
        "tasks": list(merger.adapters),
        "alone": table[0].round(3).tolist(),
        "floor": table[-1].round(3).tolist() if ends else None,
        "merges": {
            n: {"scale": scales[n], "scores": table[1 + i].round(3).tolist(), "general_kl": shifts[len(norms) + i]}
            for i, n in enumerate(which)
        },
        "general_kl_alone": dict(zip(merger.adapters, shifts, strict=False)),
        "norms": norms,
    }


def priced(run: Run, seed: int, arm: str, elsewhere: Elsewhere) -> dict[str, Any]:
    """What the adapters and the merges of `FIXED` cost outside their tasks."""
    merger = Merger(run, seed, arm)
    merges = {n: (merger.made(m, c), merger.scale(m, c, how)) for n, (m, c, how) in FIXED.items()}

    def other(layout: Layout, worn: Sequence[Worn], rows: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
        return scored(replace(run, layout=layout), lambda _: worn, rows, f"price-{seed}-{arm}")

    texts = [t[0] for t in run.general]
    return price(merger.adapters, merges, elsewhere, texts, other, lambda w: general_shift(run, merger.adapters, w))


def nodata(run: Run, seed: int, arm: str) -> dict[str, Any]:
    """The ladders of `curves` for merges that need nothing but the adapters."""
    return curves(run, seed, arm, NODATA, "nodata")


def curves(
    run: Run, seed: int, arm: str, which: Sequence[tuple[str, str | None]] = (), kind: str = "curves"
) -> dict[str, Any]:
    """Merges over a ladder of scales; of the plain arm, where none are named, every method, and every adapter on every task."""
    crossing = arm == PLAIN and not which
    merger, which = Merger(run, seed, arm), which or (CURVES_OF_PLAIN if arm == PLAIN else CURVES)
    ladders = {w: [merger.scale(*w, RULE) * by for by in LADDER] for w in which}
    merges: list[Worn] = [(merger.made(*w), s) for w, ladder in ladders.items() for s in ladder]
    crossed: list[Worn] = [(a, 1.0) for a in merger.adapters.values()] if crossing else []
    rows = {t: s.grid for t, s in splits(run.layout).items()}
    worn = [*merges, *crossed]
    table = scored(run, lambda t: [(merger.adapters[t], 1.0), (None, 0.0), *worn], rows, f"{kind}-{seed}-{arm}")
    n, start = len(LADDER), 2 + len(merges)
    return {
        "tasks": list(merger.adapters),
        "alone": table[0].round(3).tolist(),
        "floor": table[1].round(3).tolist(),
        "methods": {
            label(*w): {
                "scales": ladders[w],
                "rule": merger.scale(*w, RULE),
                "moments": merger.scale(*w, MOMENTS),
                "scores": table[2 + i * n : 2 + (i + 1) * n].round(3).tolist(),
            }
            for i, w in enumerate(which)
        },
        "crossed": {a: table[start + i].round(3).tolist() for i, a in enumerate(merger.adapters if crossed else ())},
    }


def general_shift(run: Run, adapters: Mapping[str, Adapter], worn: Sequence[Worn]) -> list[float]:
    """KL(base || worn) a token on the general texts."""
    session = run.layout.session
    texts = dict.fromkeys(adapters, (run.general[0],))
    parts = parts_of(list(adapters.values()))
    panel = Panel(session.base, parts, texts, tuple(run.general), 16, 96, _own=session.evaluator)
    for _ in range(6):
        with contextlib.suppress(torch.OutOfMemoryError):  # others are at work on the device
            return [float(x) for x in text_general(panel, worn)]
        torch.cuda.empty_cache()
        time.sleep(5)
    return [float("nan")] * len(worn)


def say(text: str) -> None:
    """A line with the time."""
    print(f"{time.strftime('%T')} {text}", flush=True)


def begin(a: argparse.Namespace) -> Run:
    """What the scripts of this study begin with: the recipe in its condition, the device, the run's folder.

    Args:
        a: --study, --set, --condition, --out, --rows, --general, --general-rows, --tokens; where there are, --memory and --few.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    writing.TOKENS_HELD["cuda"] = a.tokens
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(getattr(a, "memory", 1.0))
    names = [t["name"] for t in yaml.safe_load(a.study.read_text())["tasks"]] if a.condition != "told" else []
    recipe = read_recipe(a.study, [*a.set, *(f"tasks.{n}.text=[{a.condition}]" for n in names)])
    (a.out / "records").mkdir(parents=True, exist_ok=True)
    general = read_place(a.general, a.general_rows)
    return Run(Layout(recipe, a.out), a.out, a.rows, general, device, getattr(a, "few", False))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", required=True, type=Path)
    p.add_argument("--set", action="append", default=[], help="KEY=VALUE of the study")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument(
        "--do", required=True, help="train:SEED[:ARMS], fixed:SEED[:ARMS], curves, nodata and price, in their order"
    )
    p.add_argument(
        "--condition", choices=["told", "bare"], default="told", help="with each task's instruction, or without"
    )
    p.add_argument("--rows", type=int, default=120)
    p.add_argument("--general", required=True, help="FILE:COLUMN")
    p.add_argument("--general-rows", type=int, default=200)
    p.add_argument("--tokens", type=int, default=350_000, help="keys and values held at once on a GPU")
    p.add_argument(
        "--few",
        action="store_true",
        help="of the plain arm too only the merges that every arm has: wide adapters take long",
    )
    p.add_argument(
        "--memory",
        type=float,
        default=1.0,
        help="share of the GPU's memory that may be taken: others are at work on it",
    )
    p.add_argument("--elsewhere", default="", help="STUDY.yaml:TASK,TASK: tasks that nobody trained, for price:SEED")
    p.add_argument("--seconds", type=float, default=float("inf"))
    a = p.parse_args()
    started, run = time.time(), begin(a)
    other = elsewhere_of(a.elsewhere, a.set, run.layout.recipe.task_names, a.out, a.rows) if a.elsewhere else None
    for kind, seed, *only in (part.split(":") for part in a.do.split()):
        arms = (
            only[0].split(",")
            if only
            else [s.name for s in run.layout.recipe.arm_specs if int(seed) in arm_seeds(run, s.name)]
        )
        if kind == "train":
            trained(run, int(seed), arms)
            continue
        for arm in arms:
            file = a.out / "records" / f"{kind}-{seed}-{arm}.json"
            if file.exists():
                continue
            if time.time() - started > a.seconds:
                return say(f"time is up before {file.stem}")
            run.layout.session.load()
            begun = time.time()
            if kind == "price":
                if other is None:
                    return say("price needs --elsewhere")
                record = priced(run, int(seed), arm, other)
            else:
                record = {"fixed": fixed, "curves": curves, "nodata": nodata}[kind](run, int(seed), arm)
            file.with_suffix(".part").write_text(
                json.dumps({**record, "seconds": round(time.time() - begun, 1)}) + "\n"
            )
            file.with_suffix(".part").rename(file)
            say(f"{file.stem} in {time.time() - begun:.0f} s")
    return say("all is done")


if __name__ == "__main__":
    main()
