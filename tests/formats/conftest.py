"""A small pipeline, LoRA files for it made from known updates, and what they do when applied by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

# Module of the pipeline -> (out, in, kernel); names that Stable Diffusion has, sizes that it has not.
MODULES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": (12, 10, ()),
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0": (10, 12, ()),
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj": (16, 10, ()),
    "unet.down_blocks.0.attentions.1.proj_in": (10, 6, (1, 1)),
    "unet.down_blocks.0.resnets.0.conv1": (6, 5, (3, 3)),
    "unet.up_blocks.2.resnets.1.time_emb_proj": (6, 8, ()),
    "unet.mid_block.resnets.1.conv_shortcut": (6, 5, (1, 1)),
    "text_encoder.text_model.encoder.layers.3.self_attn.q_proj": (8, 8, ()),
    "text_encoder.text_model.encoder.layers.3.self_attn.out_proj": (8, 8, ()),
    "text_encoder.text_model.encoder.layers.3.mlp.fc1": (14, 8, ()),
}
KOHYA_NAMES = {
    m: m.replace("text_encoder.", "lora_te_", 1).replace("unet.", "lora_unet_", 1).replace(".", "_") for m in MODULES
}
Factors = Mapping[str, tuple[Tensor, Tensor, float]]


def factors_of(seed: int, rank: int = 3, alpha: float = 1.5, dtype: torch.dtype = torch.float32) -> Factors:
    """Module -> (A, B, alpha) as they are stored: convolutions with their kernels."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module, (out, width, kernel) in MODULES.items():
        A = torch.randn(rank, width, *kernel, generator=generator).to(dtype)
        B = torch.randn(out, rank, *(1 for _ in kernel), generator=generator).to(dtype)
        found[module] = (A, B, alpha)
    return found


def kohya_tensors(factors: Factors) -> dict[str, Tensor]:
    """As kohya's scripts save them."""
    found = {}
    for module, (A, B, alpha) in factors.items():
        name = KOHYA_NAMES[module]
        found |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
        found[f"{name}.alpha"] = torch.tensor(alpha, dtype=A.dtype)
    return found


def by_hand(module: str, A: Tensor, B: Tensor, scaling: float, x: Tensor) -> Tensor:
    """The update's output as its trainer computes it: two layers, one after the other."""
    kernel = MODULES[module][2]
    if not kernel:
        return scaling * nn.functional.linear(nn.functional.linear(x, A), B)
    return scaling * nn.functional.conv2d(nn.functional.conv2d(x, A, padding=kernel[0] // 2), B)


def input_of(module: str) -> Tensor:
    """Something for a module to read."""
    _, width, kernel = MODULES[module]
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*((2, width, 7, 7) if kernel else (4, width)), generator=generator, dtype=torch.float64)


def dense_output(module: str, delta: Tensor, x: Tensor) -> Tensor:
    """The same with the update as a dense weight of the module's shape."""
    out, width, kernel = MODULES[module]
    if not kernel:
        return nn.functional.linear(x, delta)
    return nn.functional.conv2d(x, delta.reshape(out, width, *kernel), padding=kernel[0] // 2)


@pytest.fixture
def kohya(tmp_path: Path) -> Callable[..., Path]:
    """kohya("a", seed=0, **changed tensors; None leaves one out) -> a file as kohya's scripts save it."""

    def make(name: str, seed: int = 0, changed: Mapping[str, Tensor | None] | None = None, **options) -> Path:
        metadata = options.pop("metadata", {"ss_base_model_version": "sd_v1"})
        tensors = {**kohya_tensors(factors_of(seed, **options)), **(changed or {})}
        path = tmp_path / f"{name}.safetensors"
        save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata=metadata)
        return path

    return make
