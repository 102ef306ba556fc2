"""Which distillation loss a panel has."""

from __future__ import annotations

from plait.fidelity.panel import Panel
from plait.learning.teachers import DistillationLoss, HeadLoss
from plait.learning.text_teachers import TextLoss


def loss_of(panel: Panel, layers: float = 0.0) -> DistillationLoss:
    """Make the loss whose targets are what the adapters themselves say.

    Args:
        panel: Base, adapters and texts.
        layers: Weight of the distance of the layers' outputs beside the answers'; 0 to leave them out.
    """
    return TextLoss(panel, layers) if panel.is_text else HeadLoss(panel, layers=layers)
