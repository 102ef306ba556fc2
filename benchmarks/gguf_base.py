"""De-quantise a GGUF of a Qwen2 into a folder of bfloat16 weights, tensors side by side: seconds where transformers takes minutes.

    python benchmarks/gguf_base.py FILE.gguf --like DIR --to DIR [--workers 16]

DIR of `--like` holds what is no weight: the config and the tokenizer that transformers makes of the same file once. The weights are
those of transformers' own conversion, bit for bit (checked on Qwen2.5-Coder-1.5B-Instruct, Q4: 339 tensors). Needs gguf.
"""

from __future__ import annotations

import argparse
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 4096  # rows de-quantised at once
LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight",
}  # fmt: skip


def name_of(tensor: str) -> str:
    """A tensor's name in transformers."""
    if tensor in WHOLE:
        return WHOLE[tensor]
    _, layer, rest = tensor.split(".", 2)
    stem, kind = rest.rsplit(".", 1)
    return f"model.layers.{layer}.{LAYER[stem]}.{kind}"


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def convert(file: Path, to: Path, workers: int) -> None:
    """Write model.safetensors, block by block."""
    from gguf import GGUFReader, dequantize

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    jobs, end = [], 0
    for tensor in GGUFReader(file).tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        start, end = end, end + 2 * int(np.prod(shape))
        header[name_of(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        rows = range(0, len(tensor.data), BLOCK) if len(shape) > 1 else [None]
        jobs += [(tensor, r, start + 2 * (r or 0) * shape[-1]) for r in rows]
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with (to / "model.safetensors").open("wb") as out, ThreadPoolExecutor(workers) as pool:
        out.write(len(head).to_bytes(8, "little") + head)
        blocks = pool.map(
            lambda j: bfloat16(
                dequantize(j[0].data if j[1] is None else j[0].data[j[1] : j[1] + BLOCK], j[0].tensor_type)
            ),
            jobs,
        )
        for (_, _, at), block in zip(jobs, blocks, strict=True):
            out.seek(8 + len(head) + at)
            out.write(block.tobytes())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path)
    p.add_argument("--like", required=True, type=Path)
    p.add_argument("--to", required=True, type=Path)
    p.add_argument("--workers", type=int, default=16)
    a = p.parse_args()
    a.to.mkdir(parents=True, exist_ok=True)
    convert(a.file, a.to, a.workers)
    for other in a.like.iterdir():
        if other.suffix != ".safetensors":
            shutil.copy(other, a.to)


if __name__ == "__main__":
    main()
