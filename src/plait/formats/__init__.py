"""Formats met in the wild: LoRA files of kohya and diffusers, and variants turned into plain LoRA."""
