"""plait: LoRA adapters that merge."""

__version__ = "0.1.0"
