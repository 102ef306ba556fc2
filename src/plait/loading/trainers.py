"""TRL, Axolotl, LLaMA-Factory and Unsloth: they load a PEFT folder by PEFT, each with a habit of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from plait.loading.account import Account, Fault
from plait.loading.contents import PeftFolder
from plait.loading.peft import peft_account

_HOW = {
    "trl": "PeftModel.from_pretrained(model, FOLDER, is_trainable=True), and no peft_config to the trainer",
    "axolotl": "lora_model_dir: FOLDER, adapter: lora",
    "llama-factory": "adapter_name_or_path: FOLDER, finetuning_type: lora",
    "unsloth": "PeftModel.from_pretrained(model, FOLDER, is_trainable=True) on the model that FastLanguageModel loaded",
}
TRAINERS = tuple(_HOW)


def trainer_account(folder: PeftFolder, trainer: str) -> Account:
    """The account of PEFT, and what the trainer adds."""
    found = peft_account(folder).named(trainer, (_HOW[trainer],), tuple(_habits(folder, trainer)))
    return replace(found, version=f"by PEFT {found.version}")


def _habits(folder: PeftFolder, trainer: str) -> Iterator[Fault]:
    if trainer != "unsloth":
        return
    if folder.model_config:
        what = "lies beside adapter_config.json: Unsloth cannot tell an adapter from a model and stops"
        yield Fault("config.json", what, "move it out of the folder", True)
    if folder.settings.raw.get("init_lora_weights") == "eva":
        yield Fault("init_lora_weights", "Unsloth refuses 'eva'", "true loads the factors as they are", True)
