"""Measures training: step overhead of each constraint, fleets against one-by-one, a whole study, and fleet evaluation.

    python benchmarks/training.py --base DIR --data DIR [--only overhead,fleet,study] [--device cuda] --out FILE.json

`--base random:mpnet:DIR` makes a model of MPNet-base's shape with random weights and the tokenizer of DIR: speed does not
depend on the weights. All figures of one file come from one run.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.disk.store import identity, versions
from plait.evaluation.evaluate import Evaluator
from plait.evaluation.fleet import Candidate, predict_many
from plait.model.base import BaseModel, backbone_of, load_task_model, load_tokenizer
from plait.tasks import Examples, Task, collate, encode, glue_task, load_examples, load_task
from plait.training import Member, TrainingSettings, attach_constraint, train_adapter, train_fleet
from plait.training.constraints import Constraint, Rule
from plait.training.losses import task_loss
from plait.training.peft_model import attach, for_task, silence_dropout

GLUE = ("cola", "sst2", "mrpc", "stsb", "rte", "qnli", "mnli", "qqp")
TARGETS = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "mpnet": ("attn.q", "attn.v"),
    "llama": ("q_proj", "v_proj"),
}


def random_model(kind: str, tokenizer: str, folder: Path) -> str:
    """A model of a known shape with random weights."""
    import transformers as hf

    hf.utils.logging.disable_progress_bar()
    config = {"mpnet": hf.MPNetConfig, "bert": hf.BertConfig}[kind](vocab_size=30527)
    hf.AutoModel.from_config(config).save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def tasks_of(root: Path, names: tuple[str, ...], rows: int, split: str) -> dict[str, tuple[Task, Examples]]:
    root = root.absolute()
    tasks = {n: load_task(glue_task(n, root), root=root) for n in names}
    return {n: (t, load_examples(t, split, root=root, rows=rows, seed=0)) for n, t in tasks.items()}


def starts(base: BaseModel, task: Task, norms: list[float], rank: int = 8) -> list[Adapter]:
    """Adapters with orthonormal A of several row norms: stand-ins for the arms of a study."""
    model = load_task_model(base, task, seed=0)
    backbone, prefix = backbone_of(model)
    names = TARGETS[backbone.config.model_type]
    shapes = {n: m.weight.shape for n, m in backbone.named_modules() if n.endswith(names) and hasattr(m, "weight")}
    found = []
    for i, norm in enumerate(norms):
        g = torch.Generator().manual_seed(i)
        modules = {
            n: LoraFactors(
                torch.linalg.qr(torch.randn(s[1], rank, generator=g))[0].T.contiguous() * norm,
                torch.zeros(s[0], rank),
                2.0,
            )
            for n, s in shapes.items()
        }
        found.append(Adapter(task.name, base.name, modules, prefix=prefix, target_modules=names))
    return found


def fleet_members(base: BaseModel, data, arms: int, settings: TrainingSettings, folder: Path) -> list[Member]:
    made = []
    for name, (task, examples) in data.items():
        for i, start in enumerate(starts(base, task, [0.5 + 0.5 * a for a in range(arms)])):
            out = folder / f"{name}-{i}"
            made.append(Member(start, task, examples, settings, i, out, identity("train", {"bench": str(out)})))
    return made


def synchronised() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# --- overhead of constraints ------------------------------------------------------------------------------------------


def overhead(base: BaseModel, data, arguments) -> dict[str, object]:
    """Median step of a plain loop with each constraint, interleaved, over rounds."""
    task, examples = next(iter(data.values()))
    tokenizer = load_tokenizer(base)
    rows = sorted(encode(tokenizer, task, examples, arguments.length), key=lambda r: -len(r["input_ids"]))
    batch = {k: v.to(base.torch_device) for k, v in collate(tokenizer, rows[: arguments.batch]).items()}
    model = load_task_model(base, task, seed=0)
    silence_dropout(model)
    started = for_task(starts(base, task, [1.0])[0], task, model)
    peft_model = attach(model, started)
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    rules = constraint_rules(started, base.torch_device)
    autocast = torch.autocast(base.torch_device.type, torch.bfloat16, enabled=arguments.precision == "bf16")

    def step() -> None:
        with autocast:
            logits = peft_model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        task_loss(task.kind, logits, batch["labels"]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    times: dict[str, list[float]] = {k: [] for k in ("free", "projected", "penalised")}
    for round_ in range(arguments.rounds):
        for kind, taken in times.items():
            remove = attach_constraint(optimizer, peft_model, Constraint(kind, rules.get(kind, {})))
            for i in range(arguments.steps_a_round + 1):
                before = synchronised()
                step()
                if i and round_:  # the first round and the first step of each are warm-up
                    taken.append(synchronised() - before)
            remove()
    medians = {k: statistics.median(v) for k, v in times.items()}
    quarters = {k: statistics.quantiles(v, n=4) for k, v in times.items()}
    shape = list(batch["input_ids"].shape)
    return {
        "batch": shape,
        "step_seconds": medians,
        "quartile_spread": {k: (q[2] - q[0]) / q[1] for k, q in quarters.items()},
        "overhead": {k: v / medians["free"] - 1 for k, v in medians.items()},
        "steps_each": len(times["free"]),
    }


def constraint_rules(adapter: Adapter, device: torch.device) -> dict[str, dict[str, Rule]]:
    """Random spans of 128 rows and random moments, shared by the modules of a layer as q and v share an input."""
    g = torch.Generator().manual_seed(0)
    shared: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    rules: dict[str, dict[str, Rule]] = {"projected": {}, "penalised": {}}
    for name, f in adapter.modules.items():
        layer, d = name.rpartition(".")[0], f.shape[1]
        if layer not in shared:
            span = torch.linalg.qr(torch.randn(d, min(128, d // 2), generator=g))[0].T
            shared[layer] = span.contiguous().to(device), (torch.eye(d) / d).to(device)
        rules["projected"][name] = Rule(shared[layer][0])
        rules["penalised"][name] = Rule(shared[layer][1], 1.0)
    return rules


# --- fleets -----------------------------------------------------------------------------------------------------------


def fleet(base: BaseModel, data, arguments) -> dict[str, object]:
    """The same members trained together and, some of them, alone with the HF Trainer and PEFT."""
    settings = TrainingSettings(
        steps=arguments.fleet_steps,
        batch_size=arguments.batch,
        max_length=arguments.length,
        precision=arguments.precision,
    )
    names = arguments.fleet_tasks.split(",")
    chosen = {n: data[n] for n in names}
    with tempfile.TemporaryDirectory() as folder:
        members = fleet_members(base, chosen, -(-arguments.members // len(chosen)), settings, Path(folder) / "fleet")
        members = members[: arguments.members]
        warm = [
            replace(m, settings=replace(settings, steps=3), out=Path(folder) / "warm" / str(i))
            for i, m in enumerate(members)
        ]
        train_fleet(warm, base)
        before = synchronised()
        together = train_fleet(members, base)
        fleet_seconds = synchronised() - before
        alone: dict[str, float] = {}
        for label, where in arguments.alone_bases(base).items():
            train_adapter_of(members[0], where, Path(folder) / f"{label}-warm", steps=3)
            before = synchronised()
            for i, m in enumerate(members[:: max(1, len(members) // arguments.alone)][: arguments.alone]):
                found = train_adapter_of(m, where, Path(folder) / f"{label}-{i}", steps=None)
                if label == "same":
                    worst = largest_difference(found, together[members.index(m)])
            alone[label] = (synchronised() - before) / arguments.alone
    rate = 60 * len(members) / fleet_seconds
    return {
        "members": len(members),
        "steps": settings.steps,
        "tasks": names,
        "fleet_seconds": fleet_seconds,
        "fleet_adapters_per_minute": rate,
        "alone_members_measured": arguments.alone,
        "alone_seconds_each": alone,
        "alone_adapters_per_minute": {k: 60 / v for k, v in alone.items()},
        "ratio": {k: rate * v / 60 for k, v in alone.items()},
        "largest_relative_difference_of_a_delta": worst,
    }


def train_adapter_of(m: Member, base: BaseModel, out: Path, steps: int | None) -> Adapter:
    settings = m.settings if steps is None else replace(m.settings, steps=steps)
    return train_adapter(
        m.initial, m.task, m.examples, base, settings, seed=m.seed, out=out, identity={"schema": 1, "o": str(out)}
    )


def largest_difference(a: Adapter, b: Adapter) -> float:
    pairs = [(f.delta(), b.modules[n].delta()) for n, f in a.modules.items()]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


# --- a whole study ----------------------------------------------------------------------------------------------------


def study(base: BaseModel, data, arguments) -> dict[str, object]:
    """Arms x tasks x steps in one fleet, then merges x tasks scored."""
    settings = TrainingSettings(
        steps=arguments.study_steps,
        batch_size=arguments.batch,
        max_length=arguments.length,
        precision=arguments.precision,
    )
    with tempfile.TemporaryDirectory() as folder:
        members = fleet_members(base, data, arguments.arms, settings, Path(folder))
        torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
        seen: list[float] = []
        before = synchronised()
        trained = train_fleet(members, base, progress=lambda *_: seen.append(time.perf_counter()))
        seconds = synchronised() - before
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    result = {
        "arms": arguments.arms,
        "tasks": len(data),
        "steps": settings.steps,
        "seconds": seconds,
        "seconds_before_the_first_step": seen[0] - before,
        "adapter_steps_per_second": len(members) * arguments.study_steps / seconds,
        "peak_gpu_gib": peak,
    }
    validation = tasks_of(Path(arguments.data), tuple(data), arguments.validation_rows, "validation")
    evaluator = Evaluator(
        base,
        {n: t for n, (t, _) in validation.items()},
        {n: e for n, (_, e) in validation.items()},
        64,
        arguments.length,
    )
    merged = stacked_merge([a for a in trained if a.name in data][:: arguments.arms])
    before = synchronised()
    rows = 0
    for name, (_, examples) in validation.items():
        head = next(a.heads[name] for a in trained if a.name == name)
        scales = [0.1 + 0.01 * i for i in range(arguments.merges)]
        predict_many(evaluator, name, [Candidate(head, merged, s) for s in scales])
        rows += len(examples)
    result["merges_scored"] = {
        "merges": arguments.merges,
        "rank": merged.rank,
        "rows": rows,
        "seconds": synchronised() - before,
    }
    return result


def stacked_merge(adapters: list[Adapter]) -> Adapter:
    """The sum of deltas at full rank, as task arithmetic leaves it."""
    from plait.adapters.lora import concatenated

    names = adapters[0].modules
    modules = {n: concatenated([a.modules[n] for a in adapters], [1.0] * len(adapters)) for n in names}
    return Adapter("merged", adapters[0].base, modules)


# --- the run ----------------------------------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--only", default="overhead,fleet,study")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--precision", default="fp32")
    p.add_argument("--alone-float32", action="store_true", help="also time one-by-one on a float32 base under autocast")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--rows", type=int, default=8000)
    p.add_argument("--rounds", type=int, default=6)
    p.add_argument("--steps-a-round", type=int, default=10)
    p.add_argument("--members", type=int, default=16)
    p.add_argument("--fleet-steps", type=int, default=100)
    p.add_argument("--fleet-tasks", default="cola,rte")
    p.add_argument("--alone", type=int, default=2)
    p.add_argument("--arms", type=int, default=7)
    p.add_argument("--study-steps", type=int, default=750)
    p.add_argument("--merges", type=int, default=200)
    p.add_argument("--validation-rows", type=int, default=1000)
    return p.parse_args()


def main() -> None:
    arguments = parsed()
    for name in ("accelerate", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        kind, _, rest = arguments.base.partition(":")
        place = arguments.base
        if kind == "random":
            shape, _, tokenizer = rest.partition(":")
            place = random_model(shape, tokenizer, Path(folder) / "base")
        base = BaseModel(place, dtype=arguments.dtype, device=arguments.device)

        def alone_bases(base: BaseModel) -> dict[str, BaseModel]:
            more = {"float32_autocast": replace(base, dtype="float32")} if arguments.alone_float32 else {}
            return {"same": base, **more}

        arguments.alone_bases = alone_bases
        data = tasks_of(Path(arguments.data), GLUE, arguments.rows, "train")
        device = (
            torch.cuda.get_device_name()
            if base.torch_device.type == "cuda"
            else platform.processor() or platform.machine()
        )
        report: dict[str, object] = {
            "base": arguments.base.split("/")[-1], "dtype": base.dtype, "precision": arguments.precision, "device": device,
            "threads": torch.get_num_threads(), "versions": versions(), "batch": arguments.batch, "length": arguments.length,
        }  # fmt: skip
        for part in arguments.only.split(","):
            started = time.perf_counter()
            report[part] = {"overhead": overhead, "fleet": fleet, "study": study}[part](base, data, arguments)
            print(part, json.dumps(report[part]), f"({time.perf_counter() - started:.0f} s)", flush=True)
            Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
