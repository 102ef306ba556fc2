"""The kinds of fault that public reports of LoRA tools name, made anew in small: commands, models, and PEFT as the judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.cli import main

SHARED = Path(__file__).parents[3] / "shared" / "cases"
IDS = torch.arange(3, 15)[None]
Said = tuple[int, str, str]


def as_sum(words: list[str]) -> list[str]:
    """The words of a command, of a merge without a method those of a plain sum."""
    other = {"auto", "--method", "-m", "--weights", "--stack", "--per-task"}
    if words[0] != "merge" or other & set(words) or any(w.endswith((".yaml", ".yml")) for w in words):
        return words
    return ["merge", "--method", "task_arithmetic", *([] if "--scale" in words else ["--scale", "1"]), *words[1:]]


@pytest.fixture
def plait(capsys, monkeypatch, tmp_path) -> Callable[..., Said]:
    """plait("merge in/a --out out") -> exit code, stdout, stderr; run in this test's folder.

    A merge that names no method is the plain sum here: these cases are about what is read and written.
    """
    monkeypatch.chdir(tmp_path)

    def run(command: str) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(as_sum(command.split()))
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture
def case(tmp_path) -> Callable[[str], None]:
    """case("25_revision_main") lays the inputs of a shared case into this test's folder as ``in``; skips where they are not."""

    def lay(name: str) -> None:
        if not (SHARED / name / "in").is_dir():
            pytest.skip(f"the cases are not at {SHARED}")
        shutil.copytree(SHARED / name / "in", tmp_path / "in", copy_function=shutil.copyfile)

    return lay


def llama(*, tied: bool = True, layers: int = 1) -> Any:
    """A tiny random Llama, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": tied}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids, **heads)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(folder: Path, model: Any, seed: int = 1, base: str = "in/base", **lora: Any) -> torch.Tensor:
    """Saves an adapter of the model by PEFT, all that trains changed at random; returns the logits of the model with it."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | lora
    wrapped = get_peft_model(model, LoraConfig(**config)).eval()
    wrapped.peft_config["default"].base_model_name_or_path = base
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.2) if "lora_" in name else parameter.add_(noise * 0.05)
    wrapped.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return logits(wrapped)


def loaded(folder: Path | str, model: Any) -> Any:
    """The model with a folder on it, as PEFT loads it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).eval()


def far(found: torch.Tensor, wanted: torch.Tensor, zero: torch.Tensor) -> float:
    """|found - wanted| as a share of |wanted - zero|, the adapter's effect."""
    return float((found - wanted).norm() / (wanted - zero).norm())


def folder_of(
    path: Path,
    shapes: dict[str, tuple[int, int]],
    seed: int = 1,
    rank: int = 4,
    more: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A PEFT folder by hand: random factors of modules (out, in), named in full, and other tensors beside them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(more or {})
    for module, (out, width) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": rank,
        "lora_alpha": 2 * rank,
    }
    fields |= {"target_modules": sorted({m.rpartition(".")[2] for m in shapes})} | config
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return path


def changed_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite the weights' file of a folder."""
    file = folder / "adapter_model.safetensors"
    save_file({k: v.clone() for k, v in change(dict(load_file(file))).items()}, file)


def changed_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> scaling * B @ A in float64, from a plain PEFT folder's own bytes and config, patterns included."""
    import re

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")

    def of(key: str, module: str) -> float:
        patterns = config.get(f"{key}_pattern") or {}
        usual = config["r"] if key == "rank" else config["lora_alpha"]
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), usual)

    found = {}
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        A, B = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
        assert A.shape[0] == of("rank", module)
        found[module] = of("alpha", module) / A.shape[0] * B.flatten(1) @ A.flatten(1)
    return found
