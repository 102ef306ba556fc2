"""Configurations with which other trainers continue from a plait folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.adapters.config import read_config
from plait.adapters.peft_format import read_adapter
from plait.errors import UsageError

_NAMES = {"axolotl": "Axolotl", "llama-factory": "LLaMA-Factory", "trl": "TRL", "unsloth": "Unsloth"}
TRAINERS = tuple(_NAMES)

_TRL = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {folder!r}, is_trainable=True)  # no peft_config below: the folder is it
{constraint}
trainer = SFTTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained({base!r}),
    args=SFTConfig(output_dir={out!r}, learning_rate=4e-4),
    train_dataset=dataset,  # rows with "prompt" and "completion", or "messages"{callbacks}
)
trainer.train()
trainer.save_model({out!r})  # a folder that `plait merge` takes
"""

_UNSLOTH = """\
from unsloth import FastLanguageModel
from trl import SFTConfig, SFTTrainer

# Given the adapter's folder, Unsloth loads the base it names and continues the adapter: do not call get_peft_model.
model, tokenizer = FastLanguageModel.from_pretrained({folder!r}, max_seq_length=2048, load_in_4bit=False)
model = FastLanguageModel.for_training(model)
{constraint}
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    args=SFTConfig(output_dir={out!r}, learning_rate=4e-4),
    train_dataset=dataset,{callbacks}
)
trainer.train()
model.save_pretrained({out!r})
"""

_CONSTRAINT = """\

# While training, a penalty on the shift of the other tasks' outputs, as `plait train --statistics` has it.
from plait.adapters.peft_format import read_adapter
from plait.statistics.lazy import read_own_and_others
from plait.training import TrainingSettings, prepare_constraint
from plait.training.callbacks import ConstraintCallback

task, statistics = read_own_and_others({own!r}, {others!r})
penalised = TrainingSettings(steps=1, constraint="penalised")  # the trainer's own steps are what counts
constraint = prepare_constraint(penalised, read_adapter({folder!r}), statistics, task=task)
"""
_CALLBACKS = "\n    callbacks=[ConstraintCallback(constraint, model)],"
_FREE = "# Nothing keeps the other tasks' outputs in place while this trains: their statistics were not given."
_NO_CALLBACK = """\
# Training is free here: {trainer} reads a file, and plait's penalty on the shift of the other tasks' outputs is a callback.
# `plait train --statistics` has it, and `plait init --for trl` and `--for unsloth` print it.
"""


def snippet(
    trainer: str, folder: str | Path, *, own: str | Path | None = None, others: Sequence[str | Path] = ()
) -> str:
    """Write what another trainer needs to continue from an adapter folder.

    Args:
        trainer: "axolotl" and "llama-factory" (YAML), "trl" and "unsloth" (Python).
        folder: A PEFT folder, as `plait init` writes it.
        own: Statistics of the adapter's own task.
        others: Statistics of the other tasks. With both, the Python carries the constraint "penalised"; without, and in
            YAML, training is free, and the text says so.

    Returns:
        The text; what the user must still name (the data) is marked in it.

    Raises:
        UsageError: Unknown trainer, or an adapter with a task's head, which these trainers of text do not train.
        InputError: Not an adapter folder.
    """
    require_trainer(trainer, None)
    folder = Path(folder)
    adapter, config = read_adapter(folder), read_config(folder)
    if adapter.heads:
        raise UsageError(f"{trainer} trains text, this adapter has a classification head", where=str(folder))
    require_trainer(trainer, adapter.task_type)
    out = f"{folder}-trained"
    if trainer in ("trl", "unsloth"):
        penalised = own is not None and len(apart := [str(p) for p in others if not _same(p, own)]) > 0
        given = {"base": adapter.base, "folder": str(folder), "out": out, "callbacks": _CALLBACKS if penalised else ""}
        given["constraint"] = _CONSTRAINT.format(own=str(own), others=apart, folder=str(folder)) if penalised else _FREE
        return (_TRL if trainer == "trl" else _UNSLOTH).format(**given)
    targets = config.target_modules
    names = sorted(adapter.full_name(m) for m in adapter.modules) if targets is None else targets
    write = _axolotl if trainer == "axolotl" else _llama_factory
    text = write(_Continued(adapter.base, str(folder), config.r, int(config.alpha), names, out))
    return _NO_CALLBACK.format(trainer=_NAMES[trainer]) + text


@dataclass(frozen=True, slots=True)
class _Continued:
    """What a trainer's file says of the adapter it continues from."""

    base: str
    folder: str
    rank: int
    alpha: int
    targets: Sequence[str] | str
    out: str


def _same(path: str | Path, own: str | Path) -> bool:
    """A glob over a pool may hold the own file too; where a path is none (yet), it is another."""
    return Path(path).exists() and Path(own).exists() and Path(path).samefile(own)


def require_trainer(trainer: str, task_type: str | None) -> None:
    """Refuse what `snippet` has nothing for.

    Raises:
        UsageError: An unknown trainer, or an adapter that is not for a causal language model.
    """
    if trainer not in TRAINERS:
        raise UsageError(f"unknown trainer {trainer!r}", hint=f"one of {', '.join(TRAINERS)}")
    if task_type not in (None, "CAUSAL_LM"):
        raise UsageError(f"{trainer} trains causal language models, this is {task_type}", hint="--task-type CAUSAL_LM")


def _axolotl(x: _Continued) -> str:
    settings = {
        "base_model": x.base,
        "adapter": "lora",
        "lora_model_dir": x.folder,  # continue from this adapter; r, alpha and targets repeat what is in it
        "lora_r": x.rank,
        "lora_alpha": x.alpha,
        "lora_target_modules": x.targets if isinstance(x.targets, str) else list(x.targets),
        "lora_dropout": 0.0,
        "datasets": [{"path": "YOUR_DATA.jsonl", "type": "alpaca"}],
        "learning_rate": 4e-4,
        "num_epochs": 1,
        "micro_batch_size": 8,
        "output_dir": x.out,
    }
    return _yaml(settings)


def _llama_factory(x: _Continued) -> str:
    settings = {
        "model_name_or_path": x.base,
        "adapter_name_or_path": x.folder,
        "create_new_adapter": False,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": x.rank,
        "lora_alpha": x.alpha,
        "lora_target": x.targets if isinstance(x.targets, str) else ",".join(x.targets),
        "dataset": "YOUR_DATASET",
        "template": "default",
        "learning_rate": 4e-4,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 8,
        "output_dir": x.out,
    }
    return _yaml(settings)


def _yaml(settings: Mapping[str, object]) -> str:
    import yaml

    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
