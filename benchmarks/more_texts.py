"""What more texts give: fits, heads and repairs that read several times the texts that a merge is chosen on; without labels.

    python benchmarks/more_texts.py --base MODEL --data GLUE --adapters RUN/adapters/kaiming --seeds 14,15,16 --out docs/results

`--adapters` holds seed-S/TASK folders as `plait run` writes them. A merge is chosen and fitted on --texts training texts of each task
without their labels, as `merge auto` does; then heads follow it, or it is repaired and they follow that, on those texts or on --all-texts
of each task. The shares of what the adapters gain are of validation rows that nothing else reads. Every repair is scored whether the texts
held out kept it or not, so that it can be seen what should decide. `--join FILE ...` takes the seeds of other files of the same settings
into --out/NAME.json, which may be there, and measures nothing. A seed that --out/NAME.json already holds is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fitted import Clock, judged
from intervals import t_interval
from judging import GLUE, Judge, task_of

from plait.adapters.lora import Adapter
from plait.adapters.peft_format import read_adapter
from plait.border.records import to_json
from plait.choosing.choose import choose, scaled
from plait.choosing.finishing import judged_with_heads
from plait.disk.store import versions
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.score import fidelities
from plait.fidelity.texts import split_off
from plait.learning.fitting import fitted
from plait.learning.heads import refit_heads, with_heads
from plait.learning.repair import repaired
from plait.merging import merge
from plait.model.base import BaseModel
from plait.tasks import load_examples

NO_TEXT, FEW = "no text", "fitted, heads: few texts"
# Name -> what it is; {few} and {all} are texts of each task. A step with a repair has two rows: kept or not, and as plait decides.
STEPS: Mapping[str, str] = {
    NO_TEXT: "TSV-M at its default scale",
    FEW: "`merge auto` with {few} texts",
    "repaired, heads: few texts": "`merge auto --repair {steps}` with {few} texts",
    "fitted, heads": "`merge auto` with {all} texts, of which the choice and the fit read {few}",
    "repaired, heads": "`merge auto --repair {steps}` with {all} texts",
    "repaired at one rate, heads": "the same, the rate of Adam 1e-3 for all factors, as before",
    "fitted on all, heads": "the fit too on {all} texts",
    "fitted on all, repaired, heads": "the fit too on {all} texts, and repaired",
}
ANYWAY = ", kept or not"
ADDED = (
    ("heads of {all} texts instead of {few}", FEW, "fitted, heads"),
    ("a repair on {few} texts, kept or not", FEW, "repaired, heads: few texts" + ANYWAY),
    ("a repair on {few} texts, as plait decides", FEW, "repaired, heads: few texts"),
    ("a repair on {all} texts, kept or not", "fitted, heads", "repaired, heads" + ANYWAY),
    ("a repair on {all} texts, as plait decides", "fitted, heads", "repaired, heads"),
    (
        "rates relative to each factor, rising at first, instead of 1e-3 for all",
        "repaired at one rate, heads" + ANYWAY,
        "repaired, heads" + ANYWAY,
    ),
    ("a fit on {all} texts", "fitted, heads", "fitted on all, heads"),
    ("a fit on {all} texts, both repaired", "repaired, heads" + ANYWAY, "fitted on all, repaired, heads" + ANYWAY),
    ("all of it, from TSV-M at its default scale", NO_TEXT, "fitted on all, repaired, heads"),
)


class Steps:
    """Merges by the names of `STEPS`, and what was seen on the way.

    Args:
        adapters: What is merged.
        steps: Steps of a repair at most.
    """

    def __init__(self, adapters: Sequence[Adapter], steps: int) -> None:
        self.steps, self.clock = steps, Clock()
        self.arms: dict[str, Adapter] = {NO_TEXT: merge(list(adapters), "tsv", verify=False).adapter}
        self.repairs: dict[str, Any] = {}

    def heads(self, name: str, panel: Panel, start: Adapter) -> None:
        """Let heads follow a merge."""
        self.arms[name] = self.clock.timed(name, lambda: refit_heads(panel, start)[0])

    def repair(self, name: str, panel: Panel, start: Adapter, **how: Any) -> None:
        """Repair a merge and let heads follow, whether that helped or not, and as `merge auto` decides."""
        most, rest = (panel.with_texts(texts, general=False) for texts in split_off(panel.texts))
        better, record = self.clock.timed(f"{name}: repair", lambda: repaired(panel, start, self.steps, **how))
        self.heads(name + ANYWAY, panel, better)
        done = judged_with_heads(panel, start, better, record) if record.kept else record
        if done.kept:
            self.arms[name] = self.arms[name + ANYWAY]
        else:
            self.heads(name, panel, start)
        worn = [(with_heads(most, m)[0], 1.0) for m in (start, better)]
        seen = [
            {"kept": f.kept, "followed": f.score, "beyond_chance": f.beyond_chance, "kept_agreement": f.kept_agreement}
            for f in fidelities(rest, worn)
        ]
        self.repairs[name] = {**to_json(done), "by_the_divergence": record.kept, "held_out_with_heads": seen}


def measured(base: BaseModel, a: argparse.Namespace, seed: str, tasks: Mapping[str, Any]) -> Any:
    """Everything about one seed."""
    root, names = Path(a.data).absolute(), list(tasks)
    adapters = [read_adapter(Path(a.adapters) / f"seed-{seed}" / n, name=n) for n in names]
    texts = {n: load_examples(tasks[n], "train", root=root, rows=a.all_texts, seed=1000 + int(seed)).texts for n in names}  # fmt: skip
    whole = Panel(base, parts_of(adapters), texts)
    few = whole.with_texts({n: rows[: a.texts] for n, rows in texts.items()})
    steps = Steps(adapters, a.repairs)
    choice = steps.clock.timed("chosen", lambda: choose(few, adapters))
    best, plain = choice.adapter, choice.unfitted or choice
    steps.heads("fitted, heads", whole, best)
    steps.repair("repaired, heads", whole, best)
    if a.older:
        steps.repair("repaired at one rate, heads", whole, best, rate=1e-3, relative=False)
    steps.heads(FEW, few, best)
    if not (a.older or a.alone):
        steps.repair("repaired, heads: few texts", few, best)
    if choice.fit and not a.shorter:
        start = scaled(plain.scored[0].tried.adapter, plain.scale)
        on_all = steps.clock.timed("fitted on all", lambda: fitted(whole, adapters, start, choice.fit))
        steps.heads("fitted on all, heads", whole, on_all)
        steps.repair("fitted on all, repaired, heads", whole, on_all)
    validation = {n: load_examples(tasks[n], "validation", root=root) for n in names}
    return {
        **judged(Judge(few, tasks, validation, a.rows), steps.arms),
        "chosen": [plain.recipe.label, plain.scale],
        "fit": asdict(choice.fit) if choice.fit else None,
        "repairs": steps.repairs,
        "seconds": steps.clock.seconds,
    }


def page(report: Mapping[str, Any]) -> str:
    """Tell the steps, what each adds, and what was seen of each repair on the texts held out."""
    seeds, settings = report["seeds"], report["settings"]
    words = {"few": settings["texts"], "all": settings["all_texts"], "steps": settings["repairs"]}
    lines = [
        f"# {report.get('title', 'What more texts give')}",
        "",
        *report["about"],
        "",
        f"`python benchmarks/more_texts.py` ({report['device']}, torch {report['versions']['torch']}); {settings['tasks'].count(',') + 1} "
        f"tasks; shares of what each task's own adapter gains over the floor, of means over tasks, on up to {settings['rows']} rows of "
        "each half of the validation sets. Nothing was chosen on these seeds, and no label is read by any step.",
        "",
        "| step | what | " + " | ".join(f"seed {s}" for s in seeds) + " | mean |",
        "|---|---|" + "---|" * (len(seeds) + 1),
    ]
    for name, what in STEPS.items():
        for row, said in ((name + ANYWAY, what + ANYWAY), (name, what)):
            shares = [s["rows"][row]["recovered"] for s in seeds.values() if row in s["rows"]]
            if shares and len(shares) == len(seeds):
                cells = " | ".join(f"{v:.3f}" for v in shares)
                lines.append(f"| {row} | {said.format(**words)} | {cells} | **{np.mean(shares):.3f}** |")
    lines += ["", *_added(seeds, words), *_repairs(seeds), *report["after"], ""]
    return "\n".join(lines)


def _added(seeds: Mapping[str, Any], words: Mapping[str, int]) -> list[str]:
    lines = [
        "## What each step adds, with its interval",
        "",
        f"Means over {len(seeds)} seeds with the 95 % t interval over them ({len(seeds) - 1} degrees of freedom).",
        "",
        "| step | added | 95 % interval |",
        "|---|---|---|",
    ]
    for said, before, after in ADDED:
        rows = [s["rows"] for s in seeds.values()]
        if len(rows) > 1 and all(before in r and after in r for r in rows):
            off = t_interval([r[after]["recovered"] - r[before]["recovered"] for r in rows])
            lines.append(f"| {said.format(**words)} | {off.mean:+.3f} | {off.low:+.3f} to {off.high:+.3f} |")
    return [*lines, ""]


def _repairs(seeds: Mapping[str, Any]) -> list[str]:
    lines = [
        "## What the texts held out say of each repair, and what came of it",
        "",
        "With heads that follow both, on the texts held out, before and after; *recovered* is of validation rows. plait keeps a repair "
        "that is closer by the divergence that it learns from, with the heads as they were and with new ones, and agrees more often beyond "
        "chance.",
        "",
        "| seed | repair | steps, seconds | kept (divergence) | agreement beyond chance | followed | recovered | plait |",
        "|---" * 8 + "|",
    ]
    before_of = {
        "repaired, heads: few texts": FEW, "repaired, heads": "fitted, heads",
        "fitted on all, repaired, heads": "fitted on all, heads", "repaired at one rate, heads": "fitted, heads",
    }  # fmt: skip
    for seed, s in seeds.items():
        for name, r in s["repairs"].items():
            before, after = r["held_out_with_heads"]
            cells = [f"{before[k]:.3f} -> {after[k]:.3f}" for k in ("kept", "beyond_chance", "followed")]
            shares = [s["rows"][row]["recovered"] for row in (before_of[name], name + ANYWAY)]
            lines.append(
                f"| {seed} | {name} | {r['steps']}, {s['seconds'][f'{name}: repair']:.0f} s | {' | '.join(cells)} | {shares[0]:.3f} -> "
                f"{shares[1]:.3f} | {'kept' if r['kept'] else 'not kept'} |"
            )
    return [*lines, ""]


def parsed() -> argparse.Namespace:
    """The arguments."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True)
    p.add_argument("--join", nargs="+", default=[], metavar="FILE", help="files of which only the seeds are taken")
    needed = not any(word == "--join" or word.startswith("--join=") for word in sys.argv)
    for name in ("base", "data", "adapters", "seeds"):
        p.add_argument(f"--{name}", required=needed)
    p.add_argument("--tasks", default=GLUE)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="auto")
    p.add_argument("--texts", type=int, default=100, help="texts of each task that choice and fit read")
    p.add_argument("--all-texts", type=int, default=500, help="texts of each task that heads and repairs read")
    p.add_argument("--repairs", type=int, default=400, help="steps of a repair at most")
    p.add_argument("--rows", type=int, default=1000)
    p.add_argument("--shorter", action="store_true", help="without the fit on all texts")
    p.add_argument(
        "--older", action="store_true", help="a repair at one rate for all factors, in place of one on few texts"
    )
    p.add_argument("--alone", action="store_true", help="the repair on --all-texts alone, none on few texts beside it")
    p.add_argument("--name", default="existing-texts", help="of the files that are written")
    return p.parse_args()


def joined(a: argparse.Namespace) -> None:
    """Take the seeds of other files of the same settings, and write the page."""
    file = Path(a.out) / f"{a.name}.json"
    parts = [json.loads(Path(f).read_text()) for f in (*([file] if file.exists() else []), *a.join)]
    if any(part["settings"] != parts[0]["settings"] for part in parts):
        raise SystemExit("not of the same settings")
    seeds = {s: r for part in reversed(parts) for s, r in part["seeds"].items()}  # what stood there stays
    whole = {**parts[0], "seeds": dict(sorted(seeds.items(), key=lambda pair: int(pair[0])))}
    file.write_text(json.dumps(whole, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(whole))


def main() -> None:
    """Measure the seeds that are missing, and write the page."""
    a = parsed()
    if a.join:
        return joined(a)
    base = BaseModel(a.base, dtype=a.dtype, device=a.device)
    tasks = {n: task_of(n, Path(a.data).absolute()) for n in a.tasks.split(",")}
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{a.name}.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"about": [], "after": [], "seeds": {}}
    settings = {k: getattr(a, k) for k in ("tasks", "texts", "all_texts", "repairs", "rows", "dtype")} | {
        "base": Path(a.base).name
    }
    if report.get("settings", settings) != settings:
        raise SystemExit(f"{file} holds results of other settings; choose another --out")
    for seed in a.seeds.split(","):
        if seed not in report["seeds"]:
            print(f"seed {seed}", flush=True)
            report["seeds"][seed] = measured(base, a, seed, tasks)
            device = torch.cuda.get_device_name() if base.torch_device.type == "cuda" else "CPU"
            report |= {"settings": settings, "device": device, "versions": versions()}
            file.write_text(json.dumps(report, indent=1) + "\n")
    text = page(report)
    file.with_suffix(".md").write_text(text)
    return print(text)


if __name__ == "__main__":
    main()
