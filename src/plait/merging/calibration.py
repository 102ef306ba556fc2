"""Calibrations: what is done to the factors before any method, and to its result after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from plait.adapters.lora import LoraFactors
from plait.errors import UsageError
from plait.merging.inputs import MergeInputs
from plait.merging.methods import pico, svc
from plait.options import did_you_mean


@dataclass(frozen=True, slots=True)
class Calibration:
    """A step around a merging method.

    Args:
        name: What `--calibrate` takes.
        before: One module -> the same module with other factors.
        after: (that module, the norm of the method's result) -> what the result is multiplied by.
        reshaped: (that module, the method's result, cut to rank) -> other factors in its place; None where a number does.
    """

    name: str
    before: Callable[[MergeInputs], MergeInputs]
    after: Callable[[MergeInputs, float], float]
    reshaped: Callable[[MergeInputs, LoraFactors], LoraFactors] | None = None


CALIBRATIONS = {
    "pico": Calibration("pico", pico.shrink_shared_directions, pico.mean_norm_factor),
    "svc": Calibration("svc", lambda x: x, lambda x, norm: 1.0, svc.calibrated),
}


def find_calibration(name: str | None) -> Calibration | None:
    """Look a calibration up.

    Raises:
        UsageError: Unknown.
    """
    if name is None:
        return None
    if name not in CALIBRATIONS:
        raise UsageError(f"unknown calibration {name!r}", hint=did_you_mean(name, CALIBRATIONS))
    return CALIBRATIONS[name]
