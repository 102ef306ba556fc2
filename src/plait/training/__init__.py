"""Training adapters: one by one, in fleets, and what keeps them in their subspace."""

from plait.training.settings import TrainingSettings, row_order, sweep
from plait.training.train import train_adapter

__all__ = ["TrainingSettings", "row_order", "sweep", "train_adapter"]
