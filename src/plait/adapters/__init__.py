"""Adapters: LoRA factors, and the PEFT folders that hold them."""
