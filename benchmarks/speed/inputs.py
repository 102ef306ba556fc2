"""What is read: random adapters and a random base in the shapes of models that people adapt, made once in a folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Shapes = dict[str, tuple[int, int]]
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def roberta_large() -> Shapes:
    """Query and value of RoBERTa-large, (out, in)."""
    names = ("attention.self.query", "attention.self.value")
    return {f"roberta.encoder.layer.{i}.{n}": (1024, 1024) for i in range(24) for n in names}


def llama(layers: int, width: int, inner: int, kv: int, only: tuple[str, ...] = ()) -> Shapes:
    """The linear layers of a decoder such as Llama-3-8B (32, 4096, 14336, 1024)."""
    sizes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
    }  # fmt: skip
    kinds = {n: s for n, s in sizes.items() if not only or n.rpartition(".")[2] in only}
    return {f"model.layers.{i}.{n}": s for i in range(layers) for n, s in kinds.items()}


def sdxl() -> Shapes:
    """The 722 linear layers that kohya adapts in SDXL's U-Net, by kohya's names."""
    found: Shapes = {}
    narrow = ["input_blocks_4_1", "input_blocks_5_1", *(f"output_blocks_{i}_1" for i in range(3, 6))]
    wide = ["input_blocks_7_1", "input_blocks_8_1", "middle_block_1", *(f"output_blocks_{i}_1" for i in range(3))]
    for block, d, depth in [*((b, 640, 2) for b in narrow), *((b, 1280, 10) for b in wide)]:
        found |= {f"lora_unet_{block}_proj_in": (d, d), f"lora_unet_{block}_proj_out": (d, d)}
        for layer in range(depth):
            inside = f"lora_unet_{block}_transformer_blocks_{layer}"
            for attention, context in (("attn1", d), ("attn2", 2048)):
                found |= {f"{inside}_{attention}_to_q": (d, d), f"{inside}_{attention}_to_out_0": (d, d)}
                found |= {f"{inside}_{attention}_to_{n}": (d, context) for n in "kv"}
            found |= {f"{inside}_ff_net_0_proj": (8 * d, d), f"{inside}_ff_net_2": (d, 4 * d)}
    return found


def peft_folders(
    folder: Path, count: int, shapes: Shapes, rank: int, dtype: str, base: str, task: str | None
) -> list[Path]:
    """Adapters as PEFT saves them; alpha is twice the rank."""
    paths = [folder / f"task{i}" for i in range(count)]
    for seed, path in enumerate(paths):
        if (path / "adapter_config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, tuple[int, ...]] = {}
        for module, (out, inner) in shapes.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = (rank, inner)
            tensors[f"base_model.model.{module}.lora_B.weight"] = (out, rank)
        _save(path / "adapter_model.safetensors", tensors, dtype, seed)
        config = {
            "peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "r": rank, "lora_alpha": 2 * rank,
            "target_modules": sorted({m.rpartition(".")[2] for m in shapes}),
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(config))
    return paths


def kohya_files(folder: Path, count: int, shapes: Shapes, rank: int) -> list[Path]:
    """LoRA files of kohya in float16, alpha half the rank."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"style{i}.safetensors" for i in range(count)]
    for seed, path in enumerate(paths):
        if not path.exists():
            tensors: dict[str, tuple[int, ...]] = {}
            for module, (out, inner) in shapes.items():
                tensors |= {f"{module}.lora_down.weight": (rank, inner), f"{module}.lora_up.weight": (out, rank)}
                tensors[f"{module}.alpha"] = ()
            _save(path, tensors, "float16", seed, rank / 2)
    return paths


def llama_base(
    folder: Path, layers: int = 22, width: int = 2048, inner: int = 5632, kv: int = 256, words: int = 32000, shards: int = 5
) -> Path:  # fmt: skip
    """A decoder of 1.1 B parameters in bfloat16, in shards."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, tuple[int, ...]] = {f"{m}.weight": s for m, s in llama(layers, width, inner, kv).items()}
    tensors |= {"model.embed_tokens.weight": (words, width), "lm_head.weight": (words, width)}
    names, files = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        inside = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        _save(folder / file, {n: tensors[n] for n in inside}, "bfloat16", i)
        files |= dict.fromkeys(inside, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "vocab_size": words, "num_attention_heads": 32, "num_key_value_heads": kv * 32 // width,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _save(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str, seed: int, alpha: float = 0.0) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    width, end = 4 if dtype == "float32" else 2, 0
    for name in sorted(tensors):
        length = width * int(np.prod(tensors[name]))
        header[name] = {"dtype": _CODES[dtype], "shape": list(tensors[name]), "data_offsets": [end, end + length]}
        end += length
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    draw = np.random.default_rng(seed)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for name in sorted(tensors):
            for piece in _numbers(tensors[name], dtype, draw, alpha):
                f.write(piece)


def _numbers(shape: tuple[int, ...], dtype: str, draw: np.random.Generator, alpha: float) -> Iterator[bytes]:
    if not shape:
        yield np.array(alpha, np.float16).tobytes()
        return
    rows = max(1, (1 << 20) // shape[-1])
    for start in range(0, shape[0], rows):
        size = (min(rows, shape[0] - start), shape[-1])
        block = draw.standard_normal(size, dtype=np.float32) * np.float32(0.02)
        yield (
            (block.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else block.astype(dtype)
        ).tobytes()
