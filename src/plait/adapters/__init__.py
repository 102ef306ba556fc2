"""Adapters: LoRA factors, and the PEFT folders that hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.border.lazy import lazily

if TYPE_CHECKING:
    from plait.adapters.lora import Adapter as Adapter
    from plait.adapters.lora import LoraFactors as LoraFactors
    from plait.adapters.lora import concatenated as concatenated
    from plait.adapters.lora import truncated as truncated
    from plait.adapters.peft_format import read_adapter as read_adapter
    from plait.adapters.peft_format import write_adapter as write_adapter

_HOMES = {
    "Adapter": "lora",
    "LoraFactors": "lora",
    "concatenated": "lora",
    "read_adapter": "peft_format",
    "truncated": "lora",
    "write_adapter": "peft_format",
}
__all__ = [*_HOMES]  # noqa: PLE0604  (strings, all of them)

__getattr__ = lazily(__name__, _HOMES)
