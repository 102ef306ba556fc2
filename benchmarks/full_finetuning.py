r"""Does the penalty do for full fine-tuning what it does for LoRA? Dense updates and adapters of the same modules, merged alike.

    PYTHONPATH=src:benchmarks python -P benchmarks/full_finetuning.py --study recipes/studies/arms-mpnet.yaml --set base.model=MPNET \
        --set data.root=GLUE --out RUN --arms full@5e-5,full_penalised@5e-5,kaiming@1e-3,contrastive_penalised@1e-3 --to docs/results

Takes base, tasks, rows, steps and seeds from a study, of classifiers or of a decoder that chooses among answers; trains every linear
module of the backbone (embeddings, norms, biases and a decoder's output layer stay as they are). `full` trains each weight itself: D,
where LoRA has B A. `full_penalised` adds beta tr(D m D^T) / tr(W0 m W0^T), the penalty in its dense form; `kaiming` and
`contrastive_penalised` are LoRA of the study's rank. An arm is NAME@RATE, and may be given at several rates; those are compared
at which the scores alone agree. One loop trains them all: AdamW, the study's schedule, clipping before the penalty joins. Merged by task
arithmetic, RegMean (base moments) and TSV-M (dense updates are cut to the width over the number of tasks first, as published); the
scale of each is chosen on one half of the validation rows and reported on the other. What lies in RUN/records is not made again;
a task that was trained before an interruption lies in RUN/updates (float32, as large as the base's linear modules) until its arm's
record is written. `--page-only` makes nothing at all. Writes NAME.json and NAME.md, by default full-finetuning.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dense_updates import DensePenalty, DenseScorer, as_adapter, norm, trainable
from dense_updates import merged as merged_dense
from safetensors import safe_open
from safetensors.torch import save_file

from plait.adapters.lora import Adapter
from plait.evaluation.features import task_vector_norm
from plait.evaluation.protocol import Scorer, cross_fitted
from plait.evaluation.splits import HALVES, split_rows
from plait.merging import merge
from plait.model.applied import applied
from plait.model.base import head_state, load_task_model
from plait.recipes.recipe import Recipe
from plait.recipes.recipe_file import read_recipe
from plait.runs.session import Session
from plait.statistics import Statistics, collect_statistics
from plait.subspaces.start import InitialSettings, initial_adapters
from plait.tasks import batches, collate, to_device
from plait.tasks.encoding import encode
from plait.tasks.task import TEXT_KINDS
from plait.training import TrainingSettings, attach_constraint, prepare_constraint
from plait.training.constraints import Constraint
from plait.training.losses import task_loss
from plait.training.peft_model import TASK_TYPES, attach, detach, for_task, silence_dropout
from plait.training.settings import row_order

# Name -> whether the update is dense, where A starts otherwise, whether it is penalised.
ARMS: Mapping[str, tuple[bool, str, bool]] = {
    "full": (True, "", False),
    "full_penalised": (True, "", True),
    "kaiming": (False, "kaiming", False),
    "kaiming_penalised": (False, "kaiming", True),
    "contrastive": (False, "contrastive", False),
    "contrastive_penalised": (False, "contrastive", True),
}
# What is compared, at rates at which the scores alone agree.
PAIRS = (
    ("full_penalised", "full"),
    ("kaiming_penalised", "kaiming"),
    ("contrastive_penalised", "kaiming"),
    ("full", "kaiming"),
    ("full_penalised", "contrastive_penalised"),
)
AGREE = 1.0  # points
MERGES: Mapping[str, tuple[float, float]] = {"task_arithmetic": (0.15, 0.84), "regmean": (0.7, 2.8), "tsv": (0.35, 1.4)}
NAME = "full-finetuning"  # of the page
TARGETS = "all-linear"
LOOK = 50  # steps between looks at the losses


def statistics_of(session: Session, seed: int) -> dict[str, Statistics]:
    """Moments of every task at every linear module."""
    collected = {}
    for name, task in session.tasks.items():
        tokenizer = session.evaluator.tokenizer
        rows = encode(tokenizer, task, session.sample(name, seed), session.recipe.data.max_length)
        given = batches(tokenizer, rows, session.recipe.statistics.batch_size, by_length=True)
        collected[name] = collect_statistics(
            session.evaluator.task_model(name), given, TARGETS, provenance={"task": name}
        )
    return collected


def starts(session: Session, statistics: Mapping[str, Statistics], arm: str, seed: int) -> dict[str, Adapter]:
    """What every task starts from; of a dense update the modules alone count."""
    dense, method, _ = ARMS[arm]
    lora, kind = session.recipe.lora, next(iter(session.tasks.values())).kind
    settings = InitialSettings(
        "kaiming" if dense else method, lora.rank, lora.alpha, task_type=TASK_TYPES[kind], target_modules=TARGETS
    )
    made = initial_adapters(
        statistics, settings, base=session.recipe.base.model, seed=seed, device=session.base.torch_device
    )
    return {t: a for t, (a, _) in made.items()}


def trained(
    session: Session, task: str, start: Adapter, settings: TrainingSettings, statistics: Mapping[str, Statistics],
    seed: int, dense: bool, *, part: tuple[int, int] = (0, 1), carried: Adapter | None = None,
) -> Adapter:  # fmt: skip
    """Train one task by a plain loop.

    Args:
        session: Base, tasks, rows.
        task: Which.
        start: From `starts`.
        settings: Steps, rate, penalty.
        statistics: Of all tasks.
        seed: Of head and rows.
        dense: Whether the weights themselves are trained; the result is then what `dense_updates.as_adapter` makes.
        part: (i, n): the i-th of n equal parts of the steps alone, AdamW starting anew in each.
        carried: An update that the base wears meanwhile.
    """
    spec, tokenizer, device = session.tasks[task], session.evaluator.tokenizer, session.base.torch_device
    rows = encode(tokenizer, spec, session.training(task, seed), settings.max_length)
    torch.manual_seed(seed)
    model = load_task_model(session.base, spec, seed=seed)
    silence_dropout(model)
    given = (session, task, settings, rows, seed, part)
    with applied(model, carried):
        started = for_task(start, spec, model)
        constraint = prepare_constraint(settings, started, statistics, task=task, device=device)
        if not dense:
            return as_factors(model, started, constraint, given)
        with trainable(model, started) as updates:
            optimizer = adamw(model, settings, list(updates.values()))
            penalty = DensePenalty(updates, constraint)
            hook = optimizer.register_step_pre_hook(lambda *_: penalty.add())
            run_steps(model, optimizer, *given)
            hook.remove()
        head = head_state(model) if started.heads else {}
        made = as_adapter(started, {m: D.detach() for m, D in updates.items()})
        return replace(made, heads={task: head} if head else {}, source={"task": task})


def as_factors(model: Any, started: Adapter, constraint: Constraint, given: tuple[Any, ...]) -> Adapter:
    """The same for LoRA, in PEFT's layers."""
    session, task, settings, *_ = given
    peft_model = attach(model, started).to(session.base.torch_device)
    optimizer = adamw(peft_model, settings)
    remove = attach_constraint(optimizer, peft_model, constraint)
    run_steps(peft_model, optimizer, *given)
    remove()  # its hooks hold the model and the optimiser, which the next task needs the room of
    return detach(peft_model, started, {"task": task})


def adamw(model: Any, settings: TrainingSettings, more: Sequence[torch.nn.Parameter] = ()) -> torch.optim.AdamW:
    """AdamW of everything in a model that is trainable, and of parameters that stand beside it."""
    parameters = [*more, *(p for p in model.parameters() if p.requires_grad)]
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)


def run_steps(
    model: Any, optimizer: torch.optim.AdamW, session: Session, task: str, settings: TrainingSettings,
    rows: Sequence[Any], seed: int, part: tuple[int, int],
) -> None:  # fmt: skip
    spec, device, tokenizer = session.tasks[task], session.base.torch_device, session.evaluator.tokenizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = settings.total_steps(len(rows))
    order = row_order(len(rows), total * settings.batch_size, seed).reshape(total, settings.batch_size)
    first, last = (total * i // part[1] for i in (part[0], part[0] + 1))
    losses: list[torch.Tensor] = []
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * settings.factor(step, total)
        batch = to_device(collate(tokenizer, [rows[i] for i in order[step]]), device)
        labels = batch.pop("labels")
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = model(**batch).logits
        loss = task_loss(spec.kind, logits, labels)
        loss.backward()
        if settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if len(losses) == LOOK or step == last - 1:
            _require_finite(task, torch.stack(losses), step)
            losses = []


def _require_finite(task: str, losses: torch.Tensor, step: int) -> None:
    """Stop where a loss, of those up to a step, is no number: looked at now and then, since to look is to wait for the GPU."""
    for i, loss in enumerate(losses.tolist()):
        if not math.isfinite(loss):
            raise SystemExit(f"{task}: the loss is {loss} at step {step - len(losses) + 1 + i}")


def merged(adapters: Mapping[str, Adapter], method: str, statistics: Mapping[str, Statistics], device: Any) -> Adapter:
    """The merge of LoRA at scale 1."""
    known = statistics if method == "regmean" else None
    return merge(list(adapters.values()), method, scale=1.0, statistics=known, device=str(device), verify=False).adapter


# --- what outlives an interruption ------------------------------------------------------------------------------------


def kept_update(
    place: Path, mark: Mapping[str, Any], like: Callable[[], Adapter], dense: bool, make: Callable[[], Adapter]
) -> Adapter:
    """Read a trained update; what is not there, or was made otherwise, is made first, and written whole or not at all.

    Args:
        place: TASK.safetensors.
        mark: How it is made, as JSON has it.
        like: Gives the adapter that it was trained from, as `for_task` prepares it.
        dense: Whether it is a dense update.
        make: What is called for a new one.
    """
    said = {"made": json.dumps(mark, sort_keys=True)}
    if place.exists():
        with safe_open(place, "pt") as file:
            if file.metadata() == said:
                return _update_of({k: file.get_tensor(k) for k in file.keys()}, like(), dense)  # noqa: SIM118 (no mapping)
    made = make()
    tensors = {f"{m}.B": f.B for m, f in made.modules.items()}
    tensors |= {} if dense else {f"{m}.A": f.A for m, f in made.modules.items()}
    tensors |= {f"head {k}": v for head in made.heads.values() for k, v in head.items()}
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_suffix(".part")
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, part, said)
    part.rename(place)
    return made


def _update_of(tensors: Mapping[str, torch.Tensor], like: Adapter, dense: bool) -> Adapter:
    head = {k.removeprefix("head "): v for k, v in tensors.items() if k.startswith("head ")}
    like = replace(like, heads={like.name: head} if head else {}, source={"task": like.name})
    if dense:
        return as_adapter(like, {m: tensors[f"{m}.B"] for m in like.modules})
    modules = {m: replace(f, A=tensors[f"{m}.A"], B=tensors[f"{m}.B"]) for m, f in like.modules.items()}
    return replace(like, modules=modules)


def record_of(
    session: Session, arm: str, rate: float, seed: int, updates: Path, moments: Callable[[int], dict[str, Statistics]]
) -> dict[str, Any]:
    """Train all tasks of an arm, merge, score; what is trained lies in a folder meanwhile, moments are those of a seed."""
    started = time.time()
    dense, _, penalised = ARMS[arm]
    recipe, device = session.recipe, session.base.torch_device

    def told(what: str) -> None:
        print(f"  {arm}@{rate:g} {what}, {time.time() - started:.0f} s", flush=True)

    statistics = moments(seed)
    constraint: dict[str, Any] = {"constraint": "penalised"} if penalised else {}
    settings = TrainingSettings(**{**recipe.training, **constraint, "lr": rate, "max_length": recipe.data.max_length})
    first = starts(session, statistics, arm, seed)
    told("statistics and starts")
    mark = {"settings": asdict(settings), "seed": seed, "lora": recipe.lora.model_dump(mode="json")}
    mark |= {k: getattr(recipe, k).model_dump(mode="json") for k in ("base", "data", "statistics")}
    adapters = {}
    for task, spec in session.tasks.items():
        adapters[task] = kept_update(
            updates / f"{task}.safetensors",
            mark,
            partial(for_task, first[task], spec, session.evaluator.task_model(task)),
            dense,
            partial(trained, session, task, first[task], settings, statistics, seed, dense),
        )
        told(f"{task}: trained")
    heads = {t: a.heads.get(t, {}) for t, a in adapters.items()}
    options = {"seed": recipe.evaluation.split_seed, "tuning_rows": recipe.tuning_rows, "grid_rows": recipe.grid_rows}
    splits = {t: split_rows(len(session.validation(t)), **options) for t in session.tasks}
    # one after another: dense updates of all tasks at once are many copies
    scorer = (DenseScorer if dense else Scorer)(session.evaluator, splits, heads)
    ends: dict[str, dict[str, float]] = {"alone": {}, "floor": {}}
    for task, split in splits.items():
        each = [
            [scorer.score(task, x, rows) for x in scorer.answers(task, [(adapters[task], 1.0), (None, 0.0)], rows)]
            for rows in (split.halves[h] for h in HALVES)
        ]
        ends["alone"][task], ends["floor"][task] = np.mean(each, 0).tolist()
    told(f"alone {np.mean(list(ends['alone'].values())):.1f}")
    merges = {}
    for method, scales in MERGES.items():
        made = (merged_dense if dense else merged)(adapters, method, statistics, device)
        told(f"{method}: merged")
        found, _ = cross_fitted(scorer, made, scales)
        scores = {t: float(np.mean([found.halves[h].score[t] for h in HALVES])) for t in session.tasks}
        merges[method] = {"scales": [found.halves[h].scale for h in HALVES], "tasks": scores}
        told(f"{method}: {np.mean(list(scores.values())):.1f}")
    norms = {t: norm(a) if dense else task_vector_norm(a) for t, a in adapters.items()}
    return {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        **ends,
        "merges": merges,
        "norms": norms,
        "seconds": round(time.time() - started, 1),
    }


def kept(place: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Read the record at a place; what is not there is made first, and written whole or not at all.

    Args:
        place: NAME.json.
        make: What is called for a new one.
    """
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(".part")
        part.write_text(json.dumps(make()) + "\n")
        part.rename(place)
    return json.loads(place.read_text())


def joined(rows: Sequence[Mapping[str, Any]], published: Path | None, by: Sequence[str]) -> list[Mapping[str, Any]]:
    """Rows, and before them those that a page already has and these do not.

    Args:
        rows: New rows.
        published: NAME.json with "rows", where there is one.
        by: What tells rows apart.
    """
    there = json.loads(published.read_text())["rows"] if published and published.exists() else []
    new = {tuple(r[k] for k in by) for r in rows}
    return [*(r for r in there if tuple(r[k] for k in by) not in new), *rows]


def rows_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each record and merge: (merged - floor) / (alone - floor) of the means over tasks, None where nothing was gained alone."""
    rows = []
    for r in records:
        alone, floor = (float(np.mean(list(r[k].values()))) for k in ("alone", "floor"))
        gain = alone - floor
        for method, merge_ in r["merges"].items():
            score = float(np.mean(list(merge_["tasks"].values())))
            rows.append({
                "arm": r["arm"], "rate": r["rate"], "seed": r["seed"], "method": method, "individual": round(alone, 3),
                "floor": round(floor, 3), "merged": round(score, 3), "recovered": round((score - floor) / gain, 4) if gain > 0 else None,
                "scale": [round(s, 4) for s in merge_["scales"]], "norm": round(float(np.mean(list(r["norms"].values()))), 4),
                "tasks": {t: round(s, 3) for t, s in merge_["tasks"].items()},
            })  # fmt: skip
    return rows


def page(rows: Sequence[Mapping[str, Any]], about: str, asked: Sequence[tuple[str, float]] = (), of: str = "") -> str:
    """The table, a line for each arm, rate and merge: means over seeds; and which (arm, rate) that were asked for have none."""
    groups: dict[tuple[str, float, str], list[Mapping[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["arm"], r["rate"], r["method"]), []).append(r)
    lines = [f"# Full fine-tuning{of and f' of {of}'}, and LoRA of the same modules", "", about, ""]
    lines += ["| arm | rate | seeds | alone | norm | merge | scale | merged | of own gain, % |", "|---" * 9 + "|"]
    for (arm, rate, method), group in groups.items():
        mean = {k: float(np.mean([r[k] for r in group])) for k in ("individual", "norm", "merged")}
        shares = [r["recovered"] for r in group]
        share = "-" if None in shares else f"{100 * float(np.mean(shares)):.0f}"
        scale = float(np.mean([s for r in group for s in r["scale"]]))
        lines.append(
            f"| `{arm}` | {rate:g} | {len(group)} | {mean['individual']:.1f} | {mean['norm']:.2f} | {method} | {scale:.2f} | "
            f"{mean['merged']:.1f} | {share} |"
        )
    if missing := [
        f"`{arm}@{rate:g}`" for arm, rate in asked if (arm, rate) not in {(r["arm"], r["rate"]) for r in rows}
    ]:
        lines += ["", f"Not run: {', '.join(missing)}."]
    return "\n".join([*lines, *compared(groups)]) + "\n"


def compared(groups: Mapping[tuple[str, float, str], Sequence[Mapping[str, Any]]]) -> list[str]:
    """A line for each pair of arms and merge: what the first has more than the second, each at the rate that `agreeing` finds."""
    lines = []
    for pair in PAIRS:
        alone = [{r: _mean(g, "individual") for (a, r, _), g in groups.items() if a == arm} for arm in pair]
        if not all(alone):
            continue
        rates = agreeing(*alone)
        for method in MERGES:
            one, other = (groups.get((arm, rate, method)) for arm, rate in zip(pair, rates, strict=True))
            if one and other and all(r["recovered"] is not None for r in (*one, *other)):
                more = [_mean(one, k) - _mean(other, k) for k in ("individual", "merged", "recovered")]
                names = " | ".join(f"`{arm}@{rate:g}`" for arm, rate in zip(pair, rates, strict=True))
                lines.append(f"| {names} | {more[0]:+.1f} | {method} | {more[1]:+.1f} | {100 * more[2]:+.0f} |")
    words = (
        f"At like scores alone: the best rates whose scores alone agree within {AGREE:g} point, else the nearest ones."
    )
    head = ["", words, "", "| arm | beside | alone | merge | merged | of own gain, % |", "|---" * 6 + "|"]
    return [*head, *lines] if lines else []


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([r[key] for r in rows]))


def agreeing(one: Mapping[float, float], other: Mapping[float, float]) -> tuple[float, float]:
    """The rates of two arms to compare: of those at which the scores alone agree within a point, the best; else the nearest.

    Args:
        one: Rate -> score alone.
        other: The same of the other arm.
    """
    pairs = [(abs(x - y), x + y, (r, s)) for r, x in one.items() for s, y in other.items()]
    close = [p for p in pairs if p[0] <= AGREE]
    return max(close, key=lambda p: p[1])[2] if close else min(pairs, key=lambda p: p[0])[2]


def about_run(recipe: Recipe, rows: Sequence[Mapping[str, Any]], a: argparse.Namespace) -> str:
    """What a page is of, and the command."""
    seeds = ", ".join(str(s) for s in sorted({r["seed"] for r in rows}))
    text = any(not isinstance(t, str) and t.kind in TEXT_KINDS for t in recipe.tasks)
    what = "the weight itself" + (" (the output layer is not)" if text else "")
    floor = (
        "No heads: the floor is the bare base."
        if text
        else "The floor is the bare base with the heads that were trained."
    )
    named = "" if a.name == NAME else f" --name {a.name}"
    return (
        f"{base_name(a.study, recipe)}, {len(recipe.task_names)} tasks ({', '.join(recipe.task_names)}), "
        f"{recipe.training.get('steps')} steps of {recipe.training.get('batch_size')} rows, seeds {seeds}. Every linear module of the "
        f"backbone is trained: `full*` {what}, the others LoRA of rank {recipe.lora.rank}. {floor} Each scale is chosen on one half, "
        "reported on the other.\n\n    PYTHONPATH=src:benchmarks python -P benchmarks/full_finetuning.py --study "
        f"recipes/studies/{a.study.name} --set base.model=BASE --set data.root=DATA --out RUN --arms {a.arms}{named} --to docs/results"
    )


def base_name(study: Path, recipe: Recipe) -> str:
    """The base's name as the study has it, whatever the folder is called that it was loaded from."""
    return Path(read_recipe(study).base.model or recipe.base.model).name


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", required=True, type=Path)
    p.add_argument("--set", action="append", default=[], help="KEY=VALUE of the study")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--arms", default="full@5e-5,full_penalised@5e-5,kaiming@1e-3,contrastive_penalised@1e-3")
    p.add_argument("--name", default=NAME, help="the page's")
    p.add_argument("--to", type=Path, help="where the page goes; by default nowhere")
    p.add_argument("--page-only", action="store_true", help="make nothing: the page of what RUN/records holds")
    a = p.parse_args(arguments)
    recipe = read_recipe(a.study, a.set)
    session = Session(recipe)
    moments = functools.cache(partial(statistics_of, session))
    asked = [(arm, rate) for arm, _, rate in (x.partition("@") for x in a.arms.split(","))]
    records = []
    for seed in recipe.seeds:
        for arm, rate in asked:
            place, updates = (a.out / k / f"{arm}@{rate}-{seed}" for k in ("records", "updates"))
            place = place.with_name(f"{place.name}.json")
            if place.exists() or not a.page_only:
                records.append(kept(place, partial(record_of, session, arm, float(rate), seed, updates, moments)))
                shutil.rmtree(updates, ignore_errors=True)
    rows = joined(rows_of(records), a.to / f"{a.name}.json" if a.to else None, ("arm", "rate", "seed", "method"))
    about = about_run(recipe, rows, a)
    told = page(
        rows, about, [(arm, float(r)) for arm, r in asked], "" if a.name == NAME else base_name(a.study, recipe)
    )
    if a.to:
        (a.to / f"{a.name}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        (a.to / f"{a.name}.md").write_text(told)
    print(told)


if __name__ == "__main__":
    main()
