"""What serving takes: bytes of adapters and bases, and the arithmetic an adapter adds to each token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plait.adapters.arrays import FLOAT32, KEEP
from plait.adapters.lora import EXPERT, LINEAR, Adapter
from plait.loading.vllm import DEFAULT_RANK, FUSED_NOTE, RANKS, VERSION, pattern_note, rank_flag
from plait.merging.rounding import dtype_for
from plait.model.stored import StoredTensor, base_tensors

# The last part of a vocabulary matrix's name: looked up, not multiplied.
LOOKED_UP_MATRICES = ("embed_tokens", "word_embeddings", "wte", "shared", "position_embeddings", "wpe")


def adapter_bytes(adapter: Adapter) -> int:
    """Bytes of an adapter's tensors as they are stored: factors, heads and what else was trained."""
    tensors = [t for f in adapter.modules.values() for t in (f.A, f.B)]
    tensors += [
        *adapter.extras.values(),
        *adapter.copies.values(),
        *(t for head in adapter.heads.values() for t in head.values()),
    ]
    return sum(t.numel() * t.element_size() for t in tensors)


def head_bytes(adapters: Sequence[Adapter]) -> int:
    """Bytes of all heads, which every way of serving keeps."""
    return sum(t.numel() * t.element_size() for a in adapters for head in a.heads.values() for t in head.values())


def factors_at(adapters: Sequence[Adapter], rank: int, itemsize: int = 4) -> int:
    """Bytes of one merged adapter's factors at a rank (a module's own sizes bound it)."""
    shapes = {m: f.shape for a in adapters for m, f in a.modules.items()}
    return sum(min(rank, out, width) * (out + width) * itemsize for out, width in shapes.values())


def merged_itemsize(adapters: Sequence[Adapter]) -> int:
    """Bytes of a number in a merge's files, which have the type of its inputs where they agree on one of 16 bits."""
    return 4 if dtype_for(KEEP, adapters) == FLOAT32 else 2


def added_flops(adapters: Sequence[Adapter], rank: int) -> int:
    """Floating-point operations a token that factors of this rank add: 2 r (in + out) a linear module."""
    shapes = {m: f.shape for a in adapters for m, f in a.modules.items() if f.kind == LINEAR}
    return sum(2 * min(rank, out, width) * (out + width) for out, width in shapes.values())


def total_rank(adapters: Sequence[Adapter]) -> int:
    """R, the largest sum of ranks at a module."""
    modules = {m for a in adapters for m in a.modules}
    return max(sum(a.modules[m].rank for a in adapters if m in a.modules) for m in modules)


def base_size(folder: Path) -> tuple[int, int]:
    """Measure a base folder in (bytes, operations a token): twice the entries of its matrices, embeddings looked up left out."""
    tensors = base_tensors(folder)
    used = [t for n, t in tensors.items() if len(t.shape) == 2 and not set(LOOKED_UP_MATRICES) & set(n.split("."))]
    return sum(_bytes(t) for t in tensors.values()), sum(2 * t.shape[0] * t.shape[1] for t in used)


def _bytes(tensor: StoredTensor) -> int:
    entries = 1
    for size in tensor.shape:
        entries *= size
    return entries * BYTES_OF_DTYPE.get(tensor.dtype, 1)


BYTES_OF_DTYPE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def vllm_notes(adapters: Sequence[Adapter]) -> list[str]:
    """Say what vLLM's multi-LoRA serving asks of these adapters (its rules: `plait.loading.vllm`)."""
    rank = max(a.rank for a in adapters)
    allowed = rank_flag(rank)
    notes = []
    if allowed is None:
        notes.append(f"rank {rank} is above what vLLM takes ({RANKS[-1]}): cut it with plait merge --rank")
    elif allowed > DEFAULT_RANK:
        notes.append(f"vLLM: --max-lora-rank {allowed} (its default is {DEFAULT_RANK})")
    else:
        notes.append(f"vLLM: --enable-lora --max-loras {len(adapters)} --max-lora-rank {allowed}")
    fused = [a.name for a in adapters if any(f.kind == EXPERT for f in a.modules.values())]
    if fused:
        notes.append(f"{', '.join(fused)}: {FUSED_NOTE}; plait merge --bake writes a model that holds them")
    patterned = [a.name for a in adapters if len({(f.rank, f.scaling) for f in a.modules.values()}) > 1]
    if patterned:
        notes.append(f"{', '.join(patterned)}: {pattern_note(exports=not fused)}")
    if any(a.heads for a in adapters):
        notes.append(
            f"vLLM {VERSION} takes a head called classifier or score inside an adapter of a classification model (by its source; "
            "not served here); plait's heads/ are served by PEFT, or one task at a time: plait export --task"
        )
    return notes
