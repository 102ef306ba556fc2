"""The folders that are served: adapters trained here for a few steps by plain PEFT, and what plait makes of them."""

from __future__ import annotations

import contextlib
import gc
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STEPS = 3
ATTENTION = ("q_proj", "v_proj")
WORDS = {
    "reviews": (
        "Review: a warm and funny film.\nFeeling: positive",
        "Review: two hours that I want back.\nFeeling: negative",
        "Review: the cast is superb.\nFeeling: positive",
        "Review: loud, long and empty.\nFeeling: negative",
    ),
    "travel": (
        "Request: book me a seat to Oslo.\nTopic: travel",
        "Request: what is left on my card?\nTopic: bank",
        "Request: which gate does it leave from?\nTopic: travel",
        "Request: move ten pounds to Ann.\nTopic: bank",
    ),
    "sums": (
        "Question: 3 + 4 =\nAnswer: seven",
        "Question: 9 - 4 =\nAnswer: five",
        "Question: 2 + 6 =\nAnswer: eight",
        "Question: 7 - 6 =\nAnswer: one",
    ),
}
# What PEFT's LoraConfig is told, and the texts it is trained on. The last two are what both servers have to refuse.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "reviews": ("reviews", {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION}),
    "travel": ("travel", {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION}),
    "sums": ("sums", {"r": 4, "lora_alpha": 16, "target_modules": ("q_proj", "k_proj", "o_proj", "up_proj")}),
    "rslora": ("travel", {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION}),
    "patterns": (
        "reviews",
        {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": (*ATTENTION, "down_proj"),
            "rank_pattern": {"v_proj": 4, "layers.3.self_attn.q_proj": 12},
            "alpha_pattern": {"v_proj": 32, "down_proj": 4},
        },
    ),
    "dora": ("reviews", {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": ATTENTION}),
    "lora_bias": ("reviews", {"r": 8, "lora_alpha": 16, "lora_bias": True, "target_modules": ATTENTION}),
}
REFUSED = ("dora", "lora_bias")
_PAIR = ("reviews", "travel")
# name: what it is, the command's arguments after `plait`, with names of folders in braces.
COMMANDS: dict[str, tuple[str, ...]] = {
    "merged by task_arithmetic": ("merge", *_PAIR, "--method", "task_arithmetic"),
    "merged by ties": ("merge", *_PAIR, "--method", "ties", "--set", "density=0.5", "--rank", "16"),
    "merged by tsv": ("merge", *_PAIR, "--method", "tsv"),
    "merged, different ranks": ("merge", "reviews", "sums"),
}
EXPORTED = ("patterns", "rslora", "merged, different ranks")


@dataclass(frozen=True, slots=True)
class Served:
    """One folder or file, and the PEFT folder whose outputs it has to give.

    Args:
        name: What it is.
        path: What the server is given; None for the base alone.
        like: The PEFT folder that PEFT loads for comparison; None for the base alone.
    """

    name: str
    path: Path | None
    like: Path | None


def trained(base: Path, root: Path, steps: int = STEPS) -> None:
    """Train every adapter of `ADAPTERS` that is not there yet, each for a few steps of AdamW in float32."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for seed, (name, (texts, options)) in enumerate(ADAPTERS.items()):
        if (root / name / "adapter_model.safetensors").exists():
            continue
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        torch.manual_seed(seed)  # after loading, which draws random numbers
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", **{**options, "target_modules": list(options["target_modules"])}
        )
        model = peft.get_peft_model(model, config)
        batch = tokenizer(list(WORDS[texts]), padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(1 if name in REFUSED else steps):
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(root / name)
        del model
        gc.collect()


def plait(*arguments: str | Path) -> tuple[int, str, str]:
    """Run a command of plait's, in this process: its exit code, and what it printed on both streams."""
    from plait.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
        except SystemExit as done:
            return int(done.code or 0), out.getvalue(), err.getvalue()
    raise RuntimeError("plait's main did not exit")


def written(root: Path, out: Path, *arguments: str | Path) -> Path:
    """Run a command that writes one folder or file, unless it is there.

    Raises:
        RuntimeError: It failed.
    """
    if not out.exists():
        code, _, printed = plait(*arguments, "--out", out)
        if code:
            raise RuntimeError(f"plait {' '.join(map(str, arguments))}: {printed}")
    return out


def folders(base: Path, root: Path) -> tuple[list[Served], list[Served]]:
    """Everything that vLLM is given, and everything that llama.cpp is: GGUF files of plait's, folders for its converter.

    Args:
        base: Folder of the base model.
        root: Where adapters and merges are kept from run to run.
    """
    root.mkdir(parents=True, exist_ok=True)
    trained(base, root)
    whole = {name: root / name for name in ADAPTERS}
    for name, (command, *rest) in COMMANDS.items():
        arguments = [root / a if a in ADAPTERS else a for a in rest]
        whole[name] = written(root, root / name.replace(",", "").replace(" ", "-"), command, *arguments)
    served = [Served(name, path, path) for name, path in whole.items() if name != "sums"]
    vllm = [Served("base", None, None), *served]
    llama = [
        Served("base", None, None),
        *(Served(f"{s.name}, converted by llama.cpp", s.path, s.like) for s in served if s.name != "travel"),
    ]
    for name in EXPORTED:
        out = root / f"{whole[name].name}-vllm"
        vllm.append(
            Served(f"{name}, exported", written(root, out, "export", whole[name], "--for", "vllm"), whole[name])
        )
    for name in ("reviews", *COMMANDS, "patterns", "rslora"):
        out = root / f"{whole[name].name}.gguf"
        arguments = ("export", whole[name], "--for", "gguf", "--base", base)
        llama.append(Served(f"{name}, exported", written(root, out, *arguments), whole[name]))
    return vllm, llama
