"""Training adapters: one by one, in fleets, and what keeps them in their subspace."""

from plait.training.constraints import Constraint, attach_constraint
from plait.training.fleet import train_fleet, train_member
from plait.training.member import Member, rates_sweep
from plait.training.prepare import prepare_constraint
from plait.training.settings import TrainingSettings, row_order, sweep
from plait.training.train import train_adapter

__all__ = [
    "Constraint",
    "Member",
    "TrainingSettings",
    "attach_constraint",
    "prepare_constraint",
    "rates_sweep",
    "row_order",
    "sweep",
    "train_adapter",
    "train_fleet",
    "train_member",
]
