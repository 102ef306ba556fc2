"""transformers 5: what `from_pretrained` makes of a whole model, and `load_adapter` of a PEFT folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from plait.loading.account import Account, Fault, Placement
from plait.loading.contents import MODEL_INDEX, ModelFolder, PeftFolder
from plait.loading.peft import peft_account
from plait.loading.tensor_names import ROOT

VERSION = "5.3 to 5.23"
_FACTORS = re.compile(r"\.(lora_(embedding_)?[AB]|base_layer|lora_magnitude_vector|modules_to_save)(\.|$)")
_TIED = ("lm_head.weight",)


def model_account(folder: ModelFolder) -> Account:
    """Every tensor of a whole model: its parameter is its own name, where the model's class has one."""
    faults = list(_index_faults(folder))
    lines: list[Placement] = []
    seen: dict[str, str] = {}
    for file, header in folder.files.items():
        for tensor, stored in header.tensors.items():
            lines.append(Placement(tensor, tensor, "weight", "loaded"))
            if tensor in seen:
                faults.append(
                    Fault(tensor, f"stands in {seen[tensor]} and in {file}: the one read last counts", "keep one")
                )
            seen[tensor] = file
            if stored.is_empty:
                faults.append(Fault(tensor, f"is empty, {list(stored.shape)}", "gather the shards before saving", True))
            elif _FACTORS.search(tensor):
                faults.append(
                    Fault(
                        tensor,
                        "is a name that PEFT leaves: no parameter of the model, dropped",
                        "bake it: plait merge --bake",
                    )
                )
    lines += [Placement(t, "", "another file", "beside") for t in folder.beside]
    return Account("transformers", VERSION, tuple(lines), tuple(_notes(folder, set(seen))), tuple(faults), own=True)


def _index_faults(folder: ModelFolder) -> Iterator[Fault]:
    for tensor, file in (folder.index or {}).items():
        if file not in folder.files:
            yield Fault(tensor, f"stands in {file}, which is gone", "take the whole folder from where it came", True)
        elif tensor not in folder.files[file].tensors:
            yield Fault(
                tensor,
                f"is not in {file}, where {MODEL_INDEX} says it is",
                "take the whole folder from where it came",
                True,
            )


def _notes(folder: ModelFolder, tensors: set[str]) -> Iterator[str]:
    tied = folder.config.get("tie_word_embeddings")
    if tied and any(t.endswith(_TIED) for t in tensors):
        yield "tie_word_embeddings is on and lm_head.weight is there: transformers 5 keeps both where they differ, older ones tie them"
    elif tied:
        yield "lm_head is tied to the input embedding"
    if isinstance(folder.config.get("quantization_config"), dict):
        yield "the config says that its weights are quantised"


def adapter_account(folder: PeftFolder) -> Account:
    """A PEFT folder loaded by `model.load_adapter(FOLDER)`, which builds what PEFT builds into the model itself."""
    found = peft_account(folder)
    lines = tuple(replace(p, parameter=p.parameter.removeprefix(ROOT)) for p in found.placements)
    named = found.named("transformers", ("model.load_adapter(FOLDER), or from_pretrained(FOLDER)",))
    return replace(named, version=f"{VERSION}, by PEFT {found.version}", placements=lines)
