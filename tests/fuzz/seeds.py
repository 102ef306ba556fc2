"""Valid files of every kind that is read, small, as bytes: what mutations start from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import write_adapter
from plait.adapters.sealed import write_sealed
from plait.disk.store import identity, staged_folder
from plait.statistics.files import write_statistics
from plait.statistics.fisher import KIND, FisherDiagonal, write_fisher
from plait.statistics.moments import ModuleInfo, Moments, Statistics

Files = dict[str, bytes]

RECIPE = b"""\
name: tiny
base: {model: /nowhere, device: cpu, dtype: float32}
data: {root: /nowhere, max_length: 24, train_rows: 8}
tasks:
- {name: topic, train: a.csv, text: [text], kind: classification, labels: [a, b]}
- sst2
lora: {rank: 2, alpha: 4.0, target_modules: [q, v]}
statistics: {samples: 16, pool: token}
arms: [kaiming, {name: mine, subspace: osrm, options: {}, training: {lr: [0.1, 0.2]}}]
training: {steps: 4, batch_size: 8, lr: 0.02, constraint: free, snapshots: [2]}
merges: [ties, {name: d, method: dare_ties, options: {density: 0.5}, scales: [0.5, 1.0]}]
evaluation: {scales: [0.5, 1.0], resamples: 50}
seeds: [0, 1]
"""
STUDY = b"""\
name: s
base: {model: /nowhere}
tasks: [sst2, mrpc]
lora: {rank: 2, target_modules: all-linear}
arms: [kaiming, {name: o, subspace: osrm, pool: mean, rank: 3}]
training: {epochs: 1.5, lr: 0.1}
merges: [task_arithmetic, ties]
rates: [0.001, 0.01]
variants: [{name: v, set: {lora.rank: 3}, arms: [o]}]
repair: {arms: [o], merge: ties, steps: 5}
"""
WHOLE = b"""\
name: whole
description: says all that a recipe may say
base: {model_name_or_path: /nowhere, revision: main, torch_dtype: bfloat16, device: "cuda:0", four_bits: nf4}
data: {root: /nowhere, train_rows: 100, validation_rows: 50, selection_rows: 20, max_seq_length: 64}
tasks:
- {name: topic, train: a.csv, validation: b.csv, text: [one, two], label: y, labels: [a, b], metrics: [accuracy, f1], empty: skip}
- {name: grade, train: g.parquet, text: one, kind: regression, metrics: pearson}
- {name: asks, train: "hub:some/rows:plain:train", text: [q, p], kind: causal, template: "{q} {p}",
   chat: prompt, stop: "\\n", extract: "(\\\\d+)", compare: number, references: answers}
lora: {r: 2, lora_alpha: 4.0, target_modules: ".*(q|v)_proj", exclude_modules: [lm_head], layers_to_transform: [0, 1]}
statistics: {samples: 16, pool: mean, batch_size: 4, memory: 2GB}
arms:
- kaiming
- {name: mine, subspace: contrastive, row_norm: 2.0, options: {rho: 0.1}, pool: token, samples: 9,
   known: 1, background: 0.5, rank: 3, rates: [0.01], seeds: [3]}
- {name: held, subspace: contrastive, like: mine, training: {constraint: projected, constraint_options: {m: 8}, max_steps: 6}}
- {name: both, subspace: kaiming, joint: true}
training:
  num_train_epochs: 1.5
  batch_size: 8
  accumulation: 2
  warmup_ratio: 0.1
  weight_decay: 0.01
  schedule: cosine
  head_lr: 0.001
  max_grad_norm: 1.0
  dropout: 0.1
  base_dropout: true
  checkpoint_every: 5
  precision: bf16
  evaluate_every: 3
  patience: 2
  report_to: [tensorboard]
  scale_from: 0.5
merges: [linear, {name: cut, method: tsv, calibrate: pico, rank: 4},
  {name: t, method: ties, options: {density: 0.3, scope: module}, scales: [1.0]}]
evaluation: {scales: [0.5, 1.0], batch_size: 8, split_seed: 1, resamples: 0, grow: true}
fleet: never
seeds: [0, 1]
rates: [0.001, 0.01]
moments: [5, 10]
tuning_seed: 77
tuning_merges: [cut]
tuning_rows: 30
grid_rows: 40
background: [{name: public, train: p.jsonl, text: one, label: y, labels: [x, z]}]
repair: {arms: [mine], merge: t, steps: 5}
variants:
- {name: wide, set: {lora.rank: 3, training.lr: 0.1, tasks.topic.text: [one]}, arms: [mine, held], merges: [cut], seeds: [4]}
"""
MERGEKITS = (
    b"models:\n- {model: base+a, parameters: {weight: 0.5}}\n- {model: base+b, parameters: {weight: 1}}\n"
    b"merge_method: ties\nbase_model: base\nparameters: {density: 0.5, normalize: true, lambda: 0.7}\ndtype: float32\n",
    b"models: [{model: base+a}, {model: base+b}]\nmerge_method: task_arithmetic\nbase_model: base\nparameters: &p {weight: -1.5}\n",
    b"merge_method: dare_linear\nbase_model: b\nmodels:\n  - model: b+x\n    parameters: {weight: 1.0, density: 0.3}\n",
)


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _bytes(write: Callable[[Path], object]) -> Files:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "x"
        write(place)
        if place.is_file():
            return {"": place.read_bytes()}
        return {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}


def adapter_folders() -> list[Files]:
    """PEFT folders: with a manifest and a head, with heads apart, of kinds of modules, and as PEFT itself writes one."""
    plain = {
        f"layer.{i}.{m}": LoraFactors(_drawn(2, 6), _drawn(4, 2), 2.0) for i in range(2) for m in ("query", "value")
    }
    mixed = {
        "words": LoraFactors(_drawn(2, 9), _drawn(4, 2), 0.5, "embedding"),
        "q": LoraFactors(_drawn(3, 6), _drawn(4, 3), 1.0),
    }
    head = {"classifier.weight": _drawn(3, 4)}
    adapters = [
        Adapter("topic", "some/base", plain, "SEQ_CLS", "bert", {"topic": head}),
        Adapter("merged", "some/base", plain, "FEATURE_EXTRACTION", "", {"a": head, "b": head}),
        Adapter("mixed", "some/base", mixed, "CAUSAL_LM"),
    ]

    def whole(adapter: Adapter) -> Callable[[Path], None]:
        def write(place: Path) -> None:
            result = {"task": adapter.name, "tasks": ["a", "b"], "method": "ties", "base_sha256": "0" * 64}
            with staged_folder(place, identity("merge", {"method": "ties", "options": {}}), result=result) as stage:
                write_adapter(stage, adapter)

        return write

    folders = [_bytes(whole(a)) for a in adapters]
    bare = {k: v for k, v in folders[0].items() if k != "plait.json"}
    config = json.loads(bare["adapter_config.json"]) | {
        "use_rslora": True,
        "rank_pattern": {r".*layer\.(?:0|1)\.query": 2},
        "alpha_pattern": {"value": 3.5},
        "exclude_modules": None,
        "loftq_config": {},
    }
    return [*folders, bare | {"adapter_config.json": json.dumps(config).encode()}]


def statistics_files() -> list[Files]:
    """Dense and sketched moments of two sites."""
    rows, found = _drawn(20, 5).double(), []
    for form in ("dense", "factor"):
        second = (rows.T @ rows).float() if form == "dense" else rows[:4].float()
        m = Moments(20, rows.sum(0).float(), second, form=form, error=0.0 if form == "dense" else 3.0)
        sites = {"layer.0.query": m, "layer.1.query": m}
        modules = {s: ModuleInfo(s, (7, 5), 3.5, False) for s in sites}
        facts = {"task": "topic", "base": "some/base", "tokens": 20, "pool": "token", "target_modules": ["query"]}
        statistics = Statistics(sites, modules, facts)
        found.append(_bytes(partial(write_statistics, statistics=statistics, identity={"a": 1})))
    return found


def lora_files() -> list[Files]:
    """LoRA files of kohya, with and without alphas and convolutions, and of diffusers with its config."""
    up = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    kohya = {
        f"{up}.lora_down.weight": _drawn(2, 6),
        f"{up}.lora_up.weight": _drawn(4, 2),
        f"{up}.alpha": torch.tensor(1.0),
    }
    conv = {
        "lora_unet_conv_in.lora_down.weight": _drawn(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": _drawn(8, 2, 1, 1),
    }
    q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    diffusers = {f"{q}.lora_A.weight": _drawn(2, 6), f"{q}.lora_B.weight": _drawn(4, 2)}
    config = {"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["to_q"], "unet.alpha_pattern": {"to_q": 3}}
    record = {"options": {"method": "ties"}, "inputs": {}, "result": {"tasks": ["a"], "base": "sd"}}
    return [
        _bytes(lambda p: save_file(kohya | conv, p, {"ss_base_model_version": "sd_v1", "plait": json.dumps(record)})),
        _bytes(lambda p: save_file(diffusers, p, {"lora_adapter_metadata": json.dumps(config)})),
        _bytes(lambda p: write_sealed(p, kohya, {"plait": json.dumps(record)})),
    ]


def fisher_files() -> list[Files]:
    """One Fisher diagonal of two modules, with and without a digest, past which few changed files come."""
    tensors = {"layer.q": _drawn(4, 6).square(), "layer.v": _drawn(2, 3).square()}
    diagonal = FisherDiagonal.held(tensors, 7, task="topic")
    sealed = _bytes(lambda p: write_fisher(p, diagonal))
    record = {"schema": 1, "examples": 7, "provenance": {"task": "topic"}}
    return [sealed, _bytes(lambda p: save_file(tensors, p, {"kind": KIND, "fisher": json.dumps(record)}))]
