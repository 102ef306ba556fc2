"""Classifiers of several architectures, adapted and saved by PEFT itself, and what PEFT gives for a merge done by hand."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapters.peft_format import read_adapter
from tests.tiny import TARGETS, save_model, save_tokenizer

TARGETED = {**TARGETS, "distilbert": ("q_lin", "v_lin")}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor reports of transformers about heads that are new."""
    import transformers as hf

    level = hf.logging.get_verbosity()
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            hf.logging.set_verbosity(level)
            hf.logging.enable_progress_bar()


def saved_base(folder: Path, architecture: str) -> Path:
    """A tiny random base with its tokenizer."""
    if folder.exists():
        return folder
    if architecture != "distilbert":
        return save_model(folder, architecture)
    import transformers as hf

    folder.mkdir(parents=True)
    words = save_tokenizer(folder, "bert")
    torch.manual_seed(0)
    config = hf.DistilBertConfig(
        vocab_size=words, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64, pad_token_id=1
    )
    hf.DistilBertModel(config).save_pretrained(folder)
    return folder


def classifier(base: Path, outputs: int, kind: str = "SequenceClassification", **options: Any) -> Any:
    """The base with a new head of so many outputs."""
    import transformers as hf

    with quiet():
        model = getattr(hf, f"AutoModelFor{kind}").from_pretrained(base, num_labels=outputs, **options).eval()
        model.config.pad_token_id = 1
        return model


def saved_classifier(
    folder: Path,
    base: Path,
    architecture: str,
    outputs: int,
    *,
    seed: int = 0,
    task_type: str = "SEQ_CLS",
    rank: int = 2,
) -> Path:
    """An adapter with a head, trained by nobody and saved by PEFT."""
    import peft

    torch.manual_seed(seed)
    kind = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}[task_type]
    config = peft.LoraConfig(
        r=rank, lora_alpha=3, target_modules=list(TARGETED[architecture]), task_type=task_type,
        modules_to_save=["pre_classifier"] if architecture == "distilbert" and task_type == "SEQ_CLS" else None,
    )  # fmt: skip
    with quiet():
        model = peft.get_peft_model(classifier(base, outputs, kind), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    return folder


def expected_logits(base: Path, folders: list[Path], task: Path, outputs: int, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the base with the sum of all updates and one adapter's head, by PEFT's own loading and no merge of ours."""
    import peft

    with quiet(), torch.no_grad():
        model = peft.PeftModel.from_pretrained(classifier(base, outputs), task).merge_and_unload()
        for other in folders:
            if other == task:
                continue
            adapter = read_adapter(other)
            modules = dict(model.named_modules())
            for name, factors in adapter.modules.items():
                modules[adapter.full_name(name)].weight += factors.delta()
        return model.eval()(**inputs).logits  # type: ignore[no-any-return]
