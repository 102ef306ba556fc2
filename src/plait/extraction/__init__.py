"""A LoRA out of a full fine-tune: the best low-rank update between two checkpoints, and what it leaves out."""
