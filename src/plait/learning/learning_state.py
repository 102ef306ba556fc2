"""Distilling that goes on where it was: all that moves while it learns, as a piece of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.border.records import from_json, to_json
from plait.fidelity.record import Look
from plait.learning.checkpoint_files import Piece
from plait.learning.checkpoints import Checkpoints
from plait.learning.distil import Learning
from plait.learning.on_policy import OnPolicyLoss
from plait.learning.teachers import DistillationLoss

_BEST = "best"


@dataclass(frozen=True, slots=True)
class KeptLearning:
    """Where a distillation is kept between its steps.

    Args:
        checkpoints: The choice's.
        name: Name of the piece.
    """

    checkpoints: Checkpoints
    name: str

    @property
    def steps(self) -> int:
        """Steps that were taken before."""
        piece = self.checkpoints.piece(self.name)
        return int(piece.values["step"]) if piece else 0

    def go_on(self, learning: Learning, loss: DistillationLoss) -> int:
        """Put everything where it was, and say after how many steps that is."""
        piece = self.checkpoints.piece(self.name)
        if piece is None:
            return 0
        device = learning.parameters[0].device
        tensors = {k: v.to(device) for k, v in piece.tensors.items() if k != "draws"}
        with torch.no_grad():
            for i, p in enumerate(learning.parameters):
                p.copy_(tensors[f"parameter.{i}"])
        for i, p in enumerate(learning.parameters):
            moments = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith(f"adam.{i}.")}
            learning.optimiser.state[p] = {**moments, "step": moments["step"].cpu()}
        learning.schedule.load_state_dict(dict(piece.values["schedule"]))
        for group, rate in zip(learning.optimiser.param_groups, learning.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        learning.losses[:] = tensors["losses"].unbind()
        learning.looks[:] = [from_json(Look, look) for look in piece.values["looks"]]
        learning.best = piece.adapters.get(_BEST)
        if isinstance(loss, OnPolicyLoss):
            loss.draws.set_state(piece.tensors["draws"])
            loss.rooms = list(piece.values["rooms"])
        return self.steps

    def keep(self, learning: Learning, loss: DistillationLoss, step: int) -> None:
        """Keep everything as it is after a step, unless that was done a moment ago."""
        self.checkpoints.keep(self.name, lambda: self._piece(learning, loss, step), later=True)

    def _piece(self, learning: Learning, loss: DistillationLoss, step: int) -> Piece:
        tensors: dict[str, Tensor] = {"losses": torch.stack(learning.losses)}
        for i, p in enumerate(learning.parameters):
            state: Mapping[str, Tensor] = learning.optimiser.state[p]
            tensors |= {f"parameter.{i}": p.detach()} | {f"adam.{i}.{k}": v for k, v in state.items()}
        values = {
            "step": step,
            "looks": [to_json(look) for look in learning.looks],
            "schedule": learning.schedule.state_dict(),
        }
        if isinstance(loss, OnPolicyLoss):
            tensors["draws"], values["rooms"] = loss.draws.get_state(), loss.rooms
        return Piece(values, tensors, {_BEST: learning.best} if learning.best else {})
