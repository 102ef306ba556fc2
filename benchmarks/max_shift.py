r"""What `merge auto --max-shift` costs: share kept of the adapters against how far the merge moves text of no task, limit by limit.

    plait demo --out DEMO
    python benchmarks/max_shift.py --adapters DEMO/adapters/kaiming/seed-0 --tasks clinc,banking,snli --work DIR \
        --general GLUE/mrpc/train.parquet:sentence1 --out docs/results

Merges the demo's plain adapters as `merge auto --general FILE --max-shift X` does, of --methods alone, without a limit and with each of
--limits (nats of KL to the base). Everything is chosen on --texts training rows of each task without their labels and --general-texts
general ones. Merges are kept in --work: what is there is not made again, so that several processes may make a limit each. What is
shown is measured on others: the share of what the adapters gain over the base, on the validation rows; the KL, on the general texts
that come after. 95 % intervals by resampling rows within each task and general texts, the same draws for every limit.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.adapters.lora import Adapter
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.choosing.auto import AutoSettings, merge_auto
from plait.demo.run import DATA, demo_base, demo_recipe
from plait.disk.store import versions
from plait.errors import RunError
from plait.evaluation.evaluate import scored_labels
from plait.fidelity.measure import closeness
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.score import outputs
from plait.fidelity.texts import read_place
from plait.model.base import BaseModel
from plait.runs.session import task_of
from plait.tasks import Task, load_examples, load_task
from plait.tasks.metrics import primary, scores

Outputs = Mapping[str, Sequence[npt.NDArray[Any]]]  # task -> logits of (adapter alone, bare base, merges...)


def points(task: Task, logits: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """Score rows in percent."""
    return primary(scores(task.metrics, logits, labels))


def shares(tasks: Mapping[str, Task], answers: Outputs, labels: Mapping[str, Any], rng: Any = None) -> list[float]:
    """Gain over the base of each merge, over that of the adapters alone, sums over tasks; on rows drawn anew where a generator is given."""
    gains = []
    for name, (alone, bare, *merged) in answers.items():
        n = len(labels[name])
        rows = np.arange(n) if rng is None else rng.integers(0, n, n)
        found = [points(tasks[name], x[rows], labels[name][rows]) for x in (bare, alone, *merged)]
        gains.append([x - found[0] for x in found[1:]])
    own, *others = np.sum(gains, 0)
    return [float(x / own) for x in others]


def moved(tasks: Mapping[str, Task], answers: Outputs, rng: Any = None) -> list[float]:
    """Mean over heads of KL(base || merged) of each merge, in nats; on texts drawn anew where a generator is given."""
    found = []
    for name, (_, bare, *merged) in answers.items():
        rows = np.arange(len(bare)) if rng is None else rng.integers(0, len(bare), len(bare))
        found.append([closeness(tasks[name].kind, bare[rows], x[rows]).kl for x in merged])
    return [float(x) for x in np.mean(found, 0)]


def between(drawn: Sequence[Sequence[float]]) -> list[list[float]]:
    """The middle 95 % of each column."""
    return np.percentile(drawn, [2.5, 97.5], axis=0).T.round(4).tolist()


def measured(panel: Panel, worn: Sequence[Adapter]) -> Outputs:
    """Outputs of the adapter alone, the base, and merges on a panel's texts."""
    return {p.name: outputs(panel, p, [(p.adapter, 1.0), (None, 1.0), *((m, 1.0) for m in worn)]) for p in panel.parts}


def chosen(
    a: argparse.Namespace, adapters: Sequence[Adapter], base: BaseModel, texts: Any, general: Any, limit: float | None
) -> tuple[Adapter | None, dict[str, Any]]:
    """Merge within a limit and say what was chosen; no merge where nothing is within. What is there is read."""
    folder = a.work / str(limit)
    if (folder / "chosen.json").exists():
        facts = json.loads((folder / "chosen.json").read_text())
        return (read_adapter(folder, name="merged") if facts else None), facts
    folder.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    try:
        settings = AutoSettings(methods=a.methods, max_shift=limit)
        made = merge_auto(adapters, base, texts, general=general, settings=settings, announce=False)
    except RunError as e:
        print(f"limit {limit}: {e}", flush=True)
        (folder / "chosen.json").write_text("{}")
        return None, {}
    how = made.record.chosen
    facts = {
        "limit": limit, "recipe": how.candidate, "scale": how.scale, "weights_learnt": bool(how.weights), "fit": how.fit is not None,
        "heads": [h.task for h in made.record.heads if h.kept],
        "shift_seen": made.fidelity.general_kl if made.fidelity else None, "followed": made.fidelity.score if made.fidelity else None,
        "cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip
    print(json.dumps(facts), flush=True)
    write_adapter(folder, made.adapter)
    (folder / "chosen.json").write_text(json.dumps(facts))
    return made.adapter, facts


def page(report: Mapping[str, Any]) -> str:
    """Tell the share kept and the distance, limit by limit."""
    about = report["about"]
    tasks, texts, general = about["tasks"], about["texts"], about["general"]
    lines = [
        "# A limit on what moves outside",
        "",
        f"`python benchmarks/max_shift.py --tasks {','.join(tasks)} ...` (CPU, torch {report['versions']['torch']}) after `plait demo`: "
        f"{len(tasks)} of its plain adapters on {about['base']} ({', '.join(tasks)}), merged as `plait merge auto --general FILE "
        f"--max-shift X` does, of {' and '.join(about['methods'])} with and without pico, by {texts} texts of each task without labels "
        f"and {general} sentences of MRPC. Measured on {about['rows']} "
        f"validation rows a task and {general} further sentences: *share kept*, the mean gain over the base with the adapter's head, over "
        "that of the adapters alone; *KL outside*, base to merge, mean over the heads. 95 % intervals over rows and sentences; *lost*: "
        "against no limit, on the same draws. One set of adapters: the intervals say nothing of other trainings. "
        f"{about.get('limits', '')}".rstrip(),
        "",
        "| limit, nats | merge | KL outside | share kept, % | lost, points | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        limit = "none" if r["limit"] is None else f"{r['limit']:.3g}"
        if "kept" not in r:
            lines.append(f"| {limit} | nothing is within it | | | | |")
            continue
        also = [w for w, on in (("weights", r["weights_learnt"]), ("fit", r["fit"]), ("heads", r["heads"])) if on]
        share, lost = ([100 * x for x in (r[k], *r[f"{k}_interval"])] for k in ("kept", "lost"))
        lines.append(
            f"| {limit} | {' + '.join([r['recipe'], *also])} at {r['scale']:.2f} | {r['shift']:.3f} ({r['shift_interval'][0]:.3f} to "
            f"{r['shift_interval'][1]:.3f}) | **{share[0]:.0f}** ({share[1]:.0f} to {share[2]:.0f}) | "
            f"{lost[0]:.0f} ({lost[1]:.0f} to {lost[2]:.0f}) | {r['cpu_seconds']:.0f} |"
        )
    return "\n".join([*lines, ""])


def limits_of(text: str) -> list[float | None]:
    """Limits in nats, such as none,0.01."""
    return [None if x == "none" else float(x) for x in text.split(",")]


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--adapters", required=True, type=Path, help="folder of TASK folders of the demo")
    p.add_argument("--general", required=True, help="FILE:COLUMN; its first texts choose, the next ones measure")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--base", help="folder of the demo's base; by default the installed one")
    p.add_argument("--tasks", type=lambda t: t.split(","), help="some of the demo's; by default all")
    p.add_argument("--texts", type=int, default=32)
    p.add_argument("--general-texts", type=int, default=40)
    p.add_argument("--methods", type=lambda t: tuple(t.split(",")), default=("tsv", "regmean"))
    p.add_argument("--limits", type=limits_of, default=[None, 0.03, 0.01], help="none first, for the page")
    p.add_argument("--about-limits", default="", help="a sentence for the page: how they were chosen")
    p.add_argument("--work", required=True, type=Path, help="where the merges are kept")
    p.add_argument("--resamples", type=int, default=1000)
    return p.parse_args(arguments)


def report_of(
    a: argparse.Namespace, tasks: Mapping[str, Task], panel: Panel, outside: Panel, labels: Any, made: Sequence[Any]
) -> dict[str, Any]:
    """Measure the merges of some limits, the one without any first.

    Args:
        a: The arguments.
        tasks: By name.
        panel: Validation rows.
        outside: General texts, as every task's.
        labels: Of the validation rows.
        made: (limit, merge or None, facts) each.
    """
    there = [(m, facts) for _, m, facts in made if m is not None]
    answers, elsewhere = (measured(p, [m for m, _ in there]) for p in (panel, outside))
    rng = np.random.default_rng(0)
    drawn = np.array([shares(tasks, answers, labels, rng) for _ in range(a.resamples)])
    spread = between([moved(tasks, elsewhere, rng) for _ in range(a.resamples)])
    now, shift = shares(tasks, answers, labels), moved(tasks, elsewhere)
    numbers = {}
    for i, (_, facts) in enumerate(there):
        numbers[facts["limit"]] = {
            **facts, "kept": now[i], "kept_interval": between(drawn)[i], "lost": now[0] - now[i],
            "lost_interval": between(drawn[:, :1] - drawn)[i], "shift": shift[i], "shift_interval": spread[i],
        }  # fmt: skip
    about = {
        "base": "all-MiniLM-L6-v2", "tasks": list(tasks), "methods": list(a.methods), "texts": a.texts, "general": a.general_texts,
        "limits": a.about_limits,
    }  # fmt: skip
    rows = [numbers.get(limit, {"limit": limit}) for limit, _, _ in made]
    return {
        "about": {**about, "rows": min(len(x) for x in labels.values())},
        "versions": versions(),
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge within every limit, measure, write the page."""
    a = parsed(arguments)
    base = BaseModel(a.base or str(demo_base()), device="cpu")
    every = {t.name: t for t in (load_task(task_of(s, DATA), root=DATA) for s in demo_recipe().tasks)}
    tasks = {n: every[n] for n in a.tasks or every}
    adapters = [read_adapter(a.adapters / n, name=n) for n in tasks]
    texts = {n: load_examples(t, "train", root=DATA, rows=a.texts, seed=1).texts for n, t in tasks.items()}
    held = {n: load_examples(t, "validation", root=DATA) for n, t in tasks.items()}
    labels = {n: scored_labels(tasks[n], e) for n, e in held.items()}
    read = read_place(a.general, 2 * a.general_texts)
    general, further = read[: a.general_texts], read[a.general_texts :]
    panel = Panel(base, parts_of(adapters), {n: e.texts for n, e in held.items()})
    outside = panel.with_texts(dict.fromkeys(tasks, further))
    made: list[Any] = []
    for limit in a.limits:
        made.append((limit, *chosen(a, adapters, base, texts, general, limit)))
    if made[0][0] is None:  # others are part of the work
        report = report_of(a, tasks, panel, outside, labels, made)
        (a.out / "max-shift.json").write_text(json.dumps(report, indent=1) + "\n")
        (a.out / "max-shift.md").write_text(page(report))
        print(page(report))


if __name__ == "__main__":
    main()
