"""Repair on policy against off policy: equal seconds, the same start and prompts, two tasks whose answers are written.

    python benchmarks/on_policy.py --base MODEL --data DATA/text --adapters DIR --out docs/results --seconds 60

Adapters that DIR lacks are trained plainly first (`--train-steps`). Both repairs begin at TSV-M at the rule's scale and learn from
`--texts` training prompts of each task, without their answers. Off policy the merge is shown what each adapter writes after its prompts
(KL(adapter || merge) at the adapter's tokens); on policy the merge writes, and the adapter judges (KL(merge || adapter) at the
merge's tokens). A few steps of each are timed, what comes before the first step included, and each then takes as many steps as fit
into `--seconds`: CPU seconds of this process, or seconds of the clock on a GPU. Judged on `--rows` validation prompts of each task:
greedy agreement with the adapter along its own answers, and ROUGE-L of what is written; 95 % intervals of the difference by resampling
prompts within each task.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter
from plait.disk import store
from plait.evaluation.writing import Writers, endings, write_ids
from plait.fidelity.language import positions, text_batches
from plait.fidelity.own_answers import answer_rows, prompts_of_part
from plait.fidelity.panel import WRITTEN, Panel, Part, parts_of
from plait.learning.distil import AHEAD, Distilled, distil
from plait.learning.losses import loss_of
from plait.learning.on_policy import OnPolicyLoss
from plait.learning.repair import LAYERS
from plait.merging import merge
from plait.merging.scales import scale_by_rule
from plait.model.applied import applied
from plait.model.base import BaseModel, backbone_of, load_task_model
from plait.tasks import Examples, Source, Task
from plait.tasks.metrics import rouge_l
from plait.tasks.tables import read_table
from plait.training.settings import TrainingSettings
from plait.training.train import train_adapter

OFF, ON = "off policy", "on policy"
TARGETS = ("q_proj", "v_proj", "o_proj")


def parsed() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True)
    p.add_argument("--data", required=True, type=Path)
    p.add_argument("--adapters", required=True, type=Path)
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--tasks", type=lambda t: t.split(","), default=["e2e_nlg", "disfl_qa"])
    p.add_argument("--train-steps", type=int, default=200)
    p.add_argument("--train-batch", type=int, default=8)
    p.add_argument("--texts", type=int, default=100)
    p.add_argument("--rows", type=int, default=200)
    p.add_argument("--seconds", type=float, default=60.0)
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--max-length", type=int, default=160)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32")
    return p.parse_args()


def rows_of_task(data: Path, task: str, split: str, most: int) -> Examples:
    """Prompts and right answers, drawn by seed 0."""
    table = read_table(data / task / f"{split}.parquet", ("prompt", "answer")).to_pydict()
    chosen = np.sort(np.random.default_rng(0).permutation(len(table["prompt"]))[:most])
    return Examples(
        tuple((table["prompt"][i],) for i in chosen), tuple(table["answer"][i] for i in chosen), np.asarray(chosen)
    )


def adapter_of(a: argparse.Namespace, base: BaseModel, name: str) -> Adapter:
    """Read a task's adapter, or train it plainly."""
    folder = a.adapters / name
    if folder.is_dir():
        return read_adapter(folder, name=name)
    task = Task(name, "causal", Source("none"), ("prompt",), "answer", metrics=("rouge_l",))
    backbone, prefix = backbone_of(load_task_model(base, task, seed=0))
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    modules = {}
    for module, layer in backbone.named_modules():
        if module.endswith(TARGETS):
            n_out, n_in = layer.weight.shape
            modules[module] = LoraFactors(torch.randn(8, n_in, generator=g) / n_in**0.5, torch.zeros(n_out, 8), 2.0)
    start = Adapter(name, base.name, modules, prefix=prefix, target_modules=TARGETS)
    settings = TrainingSettings(
        steps=a.train_steps, lr=2e-3, batch_size=a.train_batch, max_length=a.max_length, warmup_ratio=0.05
    )
    identity = store.identity("benchmark", {"steps": a.train_steps, "batch": a.train_batch}, {}, 0)
    rows = rows_of_task(a.data, name, "train", 2000)
    train_adapter(start, task, rows, base, settings, seed=0, out=folder, identity=identity)
    return read_adapter(folder, name=name)


@dataclass(frozen=True, slots=True)
class Judged:
    """What was measured of one model on the validation prompts of one task, a number a prompt.

    Args:
        agreement: Share of the tokens of the adapter's own answer that are the model's likeliest too.
        kl: Mean KL(adapter || model) at those tokens.
        rouge: ROUGE-L in percent of what it writes.
    """

    agreement: tuple[float, ...]
    kl: tuple[float, ...]
    rouge: tuple[float, ...]


@torch.no_grad()
def judged(panel: Panel, part: Part, model: Adapter | None, right: Sequence[str]) -> Judged:
    """Compare a model with a part's adapter along the adapter's own answers, and what it writes with the right answers."""
    causal, rows = panel.model(part), answer_rows(panel, part)
    agreement, kl = np.zeros(len(rows)), np.zeros(len(rows))
    for chosen, batch in text_batches(panel, rows, 1):
        logs = []
        for worn in (part.adapter, model):
            with applied(causal, worn):
                logits, mask = positions(causal, "causal", batch, 1, WRITTEN)
            logs.append(logits[0].float().log_softmax(-1))
        own, other = logs
        same = (own.argmax(-1) == other.argmax(-1)).float()
        each = (own.exp() * (own - other)).sum(-1)
        counts = mask.sum(1).tolist()
        for i, hits, far in zip(chosen, torch.split(same, counts), torch.split(each, counts), strict=True):
            agreement[i], kl[i] = float(hits.mean()), float(far.mean())
    ends = endings(causal, panel.tokenizer, "\n", panel.base.torch_device)
    with applied(causal, model):
        [ids] = write_ids(Writers(causal, panel.tokenizer, ends, panel.new_tokens), prompts_of_part(panel, part))
    texts = [panel.tokenizer.decode(i, skip_special_tokens=True).strip().split("\n")[0] for i in ids]
    rouge = [rouge_l(t, r) for t, r in zip(texts, right, strict=True)]
    return Judged(tuple(agreement), tuple(kl), tuple(rouge))


def clock_of(device: str) -> Callable[[], float]:
    """CPU seconds of this process, or the clock's on a GPU."""

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return time.process_time if device == "cpu" else now


def repaired_in(
    panel: Panel, start: Adapter, mode: str, seconds: float, seed: int, batch: int, clock: Callable[[], float]
) -> tuple[Distilled, Mapping[str, float]]:
    """Repair in as many steps as fit into some seconds, and say how many they were and how long they took."""

    def learnt(steps: int) -> tuple[Distilled, float, float]:
        begun = clock()
        fresh = replace(panel, answers={}) if mode == OFF else panel  # its adapters' writing belongs to its seconds
        loss = OnPolicyLoss(fresh, seed) if mode == ON else loss_of(fresh, LAYERS)
        ready = clock()
        done = distil(fresh, start, learns="factors", steps=steps, batch=batch, seed=seed, loss=loss)
        return done, ready - begun, clock() - ready

    _, before, took = learnt(AHEAD)
    steps = max(1, int((seconds - before) / max(took / AHEAD, 1e-3)))
    done, before, took = learnt(steps)
    took += before
    return done, {"steps": steps, "seconds": took, "first_loss": done.first_loss, "last_loss": done.last_loss}


def interval(differences: Sequence[np.ndarray], resamples: int = 10_000) -> tuple[float, float, float]:
    """Mean over tasks of the mean difference, and its 95 % interval: prompts drawn anew within each task."""
    rng = np.random.default_rng(0)
    drawn = sum(d[rng.integers(0, len(d), (resamples, len(d)))].mean(1) for d in differences) / len(differences)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(np.mean([d.mean() for d in differences])), float(low), float(high)


def main() -> None:
    a = parsed()
    started = time.perf_counter()

    def tell(what: str) -> None:
        print(f"[{time.perf_counter() - started:6.0f} s] {what}", flush=True)

    clock = clock_of(a.device)
    base = BaseModel(a.base, None, a.dtype, a.device)
    adapters = [adapter_of(a, base, n) for n in a.tasks]
    tell("adapters are there")
    texts = {n: rows_of_task(a.data, n, "train", a.texts).texts for n in a.tasks}
    held = {n: rows_of_task(a.data, n, "validation", a.rows) for n in a.tasks}
    panel = Panel(base, parts_of(adapters), texts, (), 16, a.max_length, positions=WRITTEN, new_tokens=a.new_tokens)
    judging = panel.with_texts({n: e.texts for n, e in held.items()})
    scale = scale_by_rule("tsv", None, (1.0,) * len(adapters)).value
    start = merge(adapters, "tsv", scale=scale).adapter
    models: dict[str, list[Adapter | None]] = {"base": [None], "start": [start], OFF: [], ON: []}
    took: dict[str, list[Mapping[str, float]]] = {OFF: [], ON: []}
    for seed in range(a.seeds):
        for mode in (OFF, ON) if seed % 2 == 0 else (ON, OFF):
            done, cost = repaired_in(panel, start, mode, a.seconds, seed, a.batch, clock)
            models[mode].append(done.adapter)
            took[mode].append(cost)
            tell(f"{mode}, seed {seed}: {cost['steps']} steps in {cost['seconds']:.0f} s")
    measured = {
        name: [{p.name: judged(judging, p, m, held[p.name].labels) for p in judging.parts} for m in members]
        for name, members in models.items()
    }
    measured["each adapter on its own task"] = [
        {p.name: judged(judging, p, p.adapter, held[p.name].labels) for p in judging.parts}
    ]
    tell("judged")
    report = report_of(a, scale, took, measured)
    (a.out / "repair.json").write_text(json.dumps(report, indent=1) + "\n")
    (a.out / "repair.md").write_text(page(report))
    print(page(report))


def report_of(
    a: argparse.Namespace,
    scale: float,
    took: Mapping[str, Sequence[Mapping[str, float]]],
    measured: Mapping[str, Sequence[Mapping[str, Judged]]],
) -> dict[str, object]:
    """Means of every model, and the difference of the two repairs with its interval; seeds are averaged prompt by prompt."""

    def each(name: str, task: str, what: str) -> np.ndarray:
        return np.mean([asdict(one[task])[what] for one in measured[name]], axis=0)

    rows = [
        {"model": name, "task": task, **{w: float(each(name, task, w).mean()) for w in ("agreement", "kl", "rouge")}}
        for name in measured
        for task in a.tasks
    ]
    difference = {
        what: interval([each(ON, task, what) - each(OFF, task, what) for task in a.tasks])
        for what in ("agreement", "kl", "rouge")
    }
    about = {
        k: getattr(a, k)
        for k in (
            "train_steps",
            "train_batch",
            "texts",
            "rows",
            "seconds",
            "seeds",
            "new_tokens",
            "batch",
            "device",
            "dtype",
        )
    }
    return {
        "about": {"base": Path(a.base).name, "tasks": a.tasks, "start": f"tsv at {scale:.3g}", **about},
        "took": took, "rows": rows, "on_minus_off": difference,
    }  # fmt: skip


def page(report: Mapping[str, object]) -> str:
    """Write the page of results."""
    about, rows, took = report["about"], report["rows"], report["took"]
    assert isinstance(about, dict) and isinstance(rows, list) and isinstance(took, dict)
    kind = "CPU seconds" if about["device"] == "cpu" else "seconds of one GPU"
    lines = [
        "# Repair on policy and off policy",
        "",
        f"Made by `benchmarks/on_policy.py`; nothing by hand. {about['base']}, {' and '.join(about['tasks'])}, one plain adapter each "
        f"({about['train_steps']} steps of {about['train_batch']}, rank 8). Both repairs start at {about['start']}, learn from the same "
        f"{about['texts']} training prompts of each task without their answers, and have {about['seconds']:g} {kind} each, preparations "
        f"included. Seeds of the repair: {about['seeds']}.",
        "",
        f"Judged on {about['rows']} validation prompts of each task: *agreement* with the adapter along its own greedy answer (at most "
        f"{about['new_tokens']} tokens), *KL* (adapter || model) there, *ROUGE-L* of what the model itself writes.",
        "",
        "| model | task | agreement | KL | ROUGE-L |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {r['model']} | {r['task']} | {r['agreement']:.3f} | {r['kl']:.3f} | {r['rouge']:.1f} |" for r in rows]
    lines += ["", "| repair | steps | seconds | loss, first and last tenth |", "|---|---|---|---|"]
    lines += [
        f"| {mode} | {t['steps']} | {t['seconds']:.0f} | {t['first_loss']:.3f}, {t['last_loss']:.3f} |"
        for mode, seeds in took.items()
        for t in seeds
    ]
    difference = report["on_minus_off"]
    assert isinstance(difference, dict)
    said = [
        f"{name} {mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
        for name, (mean, low, high), digits in (
            ("agreement", difference["agreement"], 3),
            ("KL", difference["kl"], 3),
            ("ROUGE-L", difference["rouge"], 1),
        )
    ]
    lines += [
        "",
        f"**On policy minus off policy**, mean over tasks with 95 % interval over prompts: {', '.join(said)}.",
        "",
        "The two losses are not on one scale: off policy KL(adapter || merge) at the adapter's tokens (and the layers' distance), on "
        "policy KL(merge || adapter) at the merge's, each relative to the bare base's there.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
