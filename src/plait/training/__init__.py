"""Training adapters: one by one, in fleets, and what keeps them in their subspace.

Imported when first used: a recipe is checked without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.border.lazy import lazily

if TYPE_CHECKING:
    from plait.training.constraints import Constraint as Constraint
    from plait.training.constraints import attach_constraint as attach_constraint
    from plait.training.fleet import train_fleet as train_fleet
    from plait.training.member import Member as Member
    from plait.training.member import rates_sweep as rates_sweep
    from plait.training.prepare import prepare_constraint as prepare_constraint
    from plait.training.settings import TrainingSettings as TrainingSettings
    from plait.training.settings import row_order as row_order
    from plait.training.settings import sweep as sweep
    from plait.training.train import train_adapter as train_adapter
    from plait.training.train import train_member as train_member

_HOMES = {
    "Constraint": "constraints",
    "Member": "member",
    "TrainingSettings": "settings",
    "attach_constraint": "constraints",
    "prepare_constraint": "prepare",
    "rates_sweep": "member",
    "row_order": "settings",
    "sweep": "settings",
    "train_adapter": "train",
    "train_fleet": "fleet",
    "train_member": "train",
}
__all__ = [*_HOMES]  # noqa: PLE0604  (strings, all of them)

__getattr__ = lazily(__name__, _HOMES)
