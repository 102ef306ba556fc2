r"""Does the penalty do for full fine-tuning what it does for LoRA? Dense updates and adapters of the same modules, merged alike.

    python -P benchmarks/full_finetuning.py --study recipes/studies/arms-mpnet.yaml --set base.model=MPNET --set data.root=GLUE --out RUN \
        --arms full@5e-5,full_penalised@5e-5,kaiming@1e-3,contrastive_penalised@1e-3 --to docs/results

Takes base, tasks, rows, steps and seeds from a study; trains every linear module of the backbone (embeddings, norms and biases stay as
they are). `full` trains each weight itself: D, where LoRA has B A. `full_penalised` adds beta tr(D m D^T) / tr(W0 m W0^T), the penalty
in its dense form; `kaiming` and `contrastive_penalised` are LoRA of the study's rank. An arm is NAME@RATE; give rates at which the
scores alone agree. One loop trains them all: AdamW, the study's schedule, clipping before the penalty joins. Merged by task
arithmetic, RegMean (base moments) and TSV-M (dense updates are cut to the width over the number of tasks first, as published); the
scale of each is chosen on one half of the validation rows and reported on the other. What lies in RUN/records is not made again;
`--page-only` makes nothing at all. Writes full-finetuning.json and full-finetuning.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.evaluation.features import task_vector_norm
from plait.evaluation.protocol import Scorer, cross_fitted
from plait.evaluation.splits import HALVES, split_rows
from plait.merging import merge
from plait.model.applied import applied
from plait.model.base import load_task_model
from plait.runs.recipe_file import read_recipe
from plait.runs.session import Session
from plait.statistics import Statistics, collect_statistics
from plait.subspaces.start import InitialSettings, initial_adapters
from plait.tasks import batches, collate, to_device
from plait.tasks.encoding import encode
from plait.training import TrainingSettings, attach_constraint, prepare_constraint
from plait.training.constraints import freeze_rows
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
MERGES: Mapping[str, tuple[float, float]] = {"task_arithmetic": (0.15, 0.84), "regmean": (0.7, 2.8), "tsv": (0.35, 1.4)}
TARGETS = "all-linear"


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
    """What every task starts from; a dense update is an adapter whose A is the identity."""
    dense, method, _ = ARMS[arm]
    lora, kind = session.recipe.lora, next(iter(session.tasks.values())).kind
    settings = InitialSettings(
        "kaiming" if dense else method, lora.rank, lora.alpha, task_type=TASK_TYPES[kind], target_modules=TARGETS
    )
    made = initial_adapters(
        statistics, settings, base=session.recipe.base.model, seed=seed, device=session.base.torch_device
    )
    return {t: identity(a) if dense else a for t, (a, _) in made.items()}


def identity(adapter: Adapter, deltas: Mapping[str, torch.Tensor] | None = None) -> Adapter:
    """Dense updates of an adapter's modules as factors: A the identity, B the update, zero where none is given."""
    modules = {}
    for name, f in adapter.modules.items():
        out, width = f.shape
        D = torch.zeros(out, width, dtype=torch.float32) if deltas is None else deltas[name]
        modules[name] = LoraFactors(torch.eye(width, dtype=torch.float32), D, 1.0, f.kind)
    return replace(adapter, modules=modules)


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
        dense: Whether A stays the identity.
        part: (i, n): the i-th of n equal parts of the steps alone, AdamW starting anew in each.
        carried: An update that the base wears meanwhile.
    """
    spec, tokenizer = session.tasks[task], session.evaluator.tokenizer
    examples = session.training(task, seed)
    rows = encode(tokenizer, spec, examples, settings.max_length)
    torch.manual_seed(seed)
    model = load_task_model(session.base, spec, seed=seed)
    silence_dropout(model)
    with applied(model, carried):
        return _steps(session, task, for_task(start, spec, model), model, rows, settings, statistics, seed, dense, part)


def _steps(
    session: Session, task: str, started: Adapter, model: Any, rows: Sequence[Any], settings: TrainingSettings,
    statistics: Mapping[str, Statistics], seed: int, dense: bool, part: tuple[int, int],
) -> Adapter:  # fmt: skip
    spec, device, tokenizer = session.tasks[task], session.base.torch_device, session.evaluator.tokenizer
    constraint = prepare_constraint(settings, started, statistics, task=task, device=device)
    peft_model = attach(model, started).to(device)
    if dense:
        freeze_rows(peft_model)
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    remove = attach_constraint(optimizer, peft_model, constraint)
    total = settings.total_steps(len(rows))
    order = row_order(len(rows), total * settings.batch_size, seed).reshape(total, settings.batch_size)
    for step in range(total * part[0] // part[1], total * (part[0] + 1) // part[1]):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * settings.factor(step, total)
        batch = to_device(collate(tokenizer, [rows[i] for i in order[step]]), device)
        labels = batch.pop("labels")
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = peft_model(**batch).logits
        loss = task_loss(spec.kind, logits, labels)
        if not torch.isfinite(loss):
            raise SystemExit(f"{task}: the loss is {float(loss)} at step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    remove()  # its hooks hold the model and the optimiser, which the next task needs the room of
    return detach(peft_model, started, {"task": task})


def cut(adapter: Adapter, tasks: int, device: Any) -> Adapter:
    """The largest singular triplets of each dense update, as many as the width over the number of tasks."""
    modules = {}
    for name, f in adapter.modules.items():
        U, S, Vh = torch.linalg.svd(f.delta().to(device), full_matrices=False)
        k = max(1, min(f.shape) // tasks)
        modules[name] = LoraFactors(Vh[:k].cpu().contiguous(), (U[:, :k] * S[:k]).cpu(), 1.0, f.kind)
    return replace(adapter, modules=modules)


def merged(
    adapters: Mapping[str, Adapter], method: str, statistics: Mapping[str, Statistics], dense: bool, device: Any
) -> Adapter:
    """The merge at scale 1; a dense one as one matrix a module again."""
    inputs = [cut(a, len(adapters), device) if dense and method == "tsv" else a for a in adapters.values()]
    known = statistics if method == "regmean" else None
    made = merge(inputs, method, scale=1.0, statistics=known, device=str(device), verify=False).adapter
    return identity(made, {m: f.delta() for m, f in made.modules.items()}) if dense else made


def record_of(session: Session, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """Train all tasks of an arm, merge, score."""
    started = time.time()
    dense, _, penalised = ARMS[arm]
    recipe, device = session.recipe, session.base.torch_device
    statistics = statistics_of(session, seed)
    constraint: dict[str, Any] = {"constraint": "penalised"} if penalised else {}
    settings = TrainingSettings(**{**recipe.training, **constraint, "lr": rate, "max_length": recipe.data.max_length})
    first = starts(session, statistics, arm, seed)
    adapters = {}
    for task in session.tasks:
        adapters[task] = trained(session, task, first[task], settings, statistics, seed, dense)
        print(f"  {arm}@{rate:g} {task}: trained, {time.time() - started:.0f} s", flush=True)
    heads = {t: a.heads.get(t, {}) for t, a in adapters.items()}
    options = {"seed": recipe.evaluation.split_seed, "tuning_rows": recipe.tuning_rows, "grid_rows": recipe.grid_rows}
    splits = {t: split_rows(len(session.validation(t)), **options) for t in session.tasks}
    scorer = Scorer(
        session.evaluator, splits, heads
    )  # one after another: dense updates of all tasks at once are many copies
    ends: dict[str, dict[str, float]] = {"alone": {}, "floor": {}}
    for task, split in splits.items():
        each = [
            [scorer.score(task, x, rows) for x in scorer.answers(task, [(adapters[task], 1.0), (None, 0.0)], rows)]
            for rows in (split.halves[h] for h in HALVES)
        ]
        ends["alone"][task], ends["floor"][task] = np.mean(each, 0).tolist()
    merges = {}
    for method, scales in MERGES.items():
        found, _ = cross_fitted(scorer, merged(adapters, method, statistics, dense, device), scales)
        scores = {t: float(np.mean([found.halves[h].score[t] for h in HALVES])) for t in session.tasks}
        merges[method] = {"scales": [found.halves[h].scale for h in HALVES], "tasks": scores}
        print(
            f"  {arm}@{rate:g} {method}: {np.mean(list(scores.values())):.1f}, {time.time() - started:.0f} s",
            flush=True,
        )
    norms = {t: task_vector_norm(a) for t, a in adapters.items()}
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
    """A row for each record and merge: (merged - floor) / (alone - floor) of the means over tasks."""
    rows = []
    for r in records:
        alone, floor = (float(np.mean(list(r[k].values()))) for k in ("alone", "floor"))
        for method, merge_ in r["merges"].items():
            score = float(np.mean(list(merge_["tasks"].values())))
            rows.append({
                "arm": r["arm"], "rate": r["rate"], "seed": r["seed"], "method": method, "individual": round(alone, 3),
                "floor": round(floor, 3), "merged": round(score, 3), "recovered": round((score - floor) / (alone - floor), 4),
                "scale": [round(s, 4) for s in merge_["scales"]], "norm": round(float(np.mean(list(r["norms"].values()))), 4),
                "tasks": {t: round(s, 3) for t, s in merge_["tasks"].items()},
            })  # fmt: skip
    return rows


def page(rows: Sequence[Mapping[str, Any]], about: str, asked: Sequence[tuple[str, float]] = ()) -> str:
    """The table, a line for each arm, rate and merge: means over seeds; and which of the (arm, rate) that were asked for have none."""
    groups: dict[tuple[str, float, str], list[Mapping[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["arm"], r["rate"], r["method"]), []).append(r)
    lines = ["# Full fine-tuning, and LoRA of the same modules", "", about, ""]
    lines += ["| arm | rate | seeds | alone | norm | merge | scale | merged | of own gain, % |", "|---" * 9 + "|"]
    for (arm, rate, method), group in groups.items():
        mean = {k: float(np.mean([r[k] for r in group])) for k in ("individual", "norm", "merged", "recovered")}
        scale = float(np.mean([s for r in group for s in r["scale"]]))
        lines.append(
            f"| `{arm}` | {rate:g} | {len(group)} | {mean['individual']:.1f} | {mean['norm']:.2f} | {method} | {scale:.2f} | "
            f"{mean['merged']:.1f} | {100 * mean['recovered']:.0f} |"
        )
    if missing := [
        f"`{arm}@{rate:g}`" for arm, rate in asked if (arm, rate) not in {(r["arm"], r["rate"]) for r in rows}
    ]:
        lines += ["", f"Not run: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", required=True, type=Path)
    p.add_argument("--set", action="append", default=[], help="KEY=VALUE of the study")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--arms", default="full@5e-5,full_penalised@5e-5,kaiming@1e-3,contrastive_penalised@1e-3")
    p.add_argument("--to", type=Path, help="where the page goes; by default nowhere")
    p.add_argument("--page-only", action="store_true", help="make nothing: the page of what RUN/records holds")
    a = p.parse_args(arguments)
    recipe = read_recipe(a.study, a.set)
    session = Session(recipe)
    places = [
        (a.out / "records" / f"{arm}@{rate}-{seed}.json", partial(record_of, session, arm, float(rate), seed))
        for seed in recipe.seeds
        for arm, _, rate in (x.partition("@") for x in a.arms.split(","))
    ]
    asked = [(arm, float(rate)) for arm, _, rate in (x.partition("@") for x in a.arms.split(","))]
    records = [kept(place, make) for place, make in places if place.exists() or not a.page_only]
    by = ("arm", "rate", "seed", "method")
    rows = joined(rows_of(records), a.to / "full-finetuning.json" if a.to else None, by)
    steps = f"{recipe.training.get('steps')} steps of {recipe.training.get('batch_size')} rows"
    seeds = ", ".join(str(s) for s in sorted({r["seed"] for r in rows}))
    about = (
        f"{Path(recipe.base.model).name}, {len(recipe.task_names)} tasks ({', '.join(recipe.task_names)}), {steps}, seeds "
        f"{seeds}. Every linear module of the backbone is trained: `full*` the weight itself, the others "
        f"LoRA of rank {recipe.lora.rank}. The floor is the bare base with the heads that were trained. Each scale is chosen on one "
        "half, reported on the other.\n\n    python -P benchmarks/full_finetuning.py --study STUDY --set base.model=BASE "
        f"--set data.root=DATA --out RUN --arms {a.arms} --to docs/results"
    )
    if a.to:
        (a.to / "full-finetuning.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        (a.to / "full-finetuning.md").write_text(page(rows, about, asked))
    print(page(rows, about, asked))


if __name__ == "__main__":
    main()
