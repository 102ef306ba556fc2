"""Repairing a merge by distilling its adapters into it, kept where texts that were held out say that it helped."""

from __future__ import annotations

from plait.adapters.lora import Adapter
from plait.fidelity.choose import FEWEST, HELD_OUT
from plait.fidelity.distil import distil
from plait.fidelity.panel import Panel
from plait.fidelity.record import Repair
from plait.fidelity.score import fidelities
from plait.fidelity.texts import split_off


def repaired(panel: Panel, merge: Adapter, steps: int, seed: int = 0) -> tuple[Adapter, Repair]:
    """Repair a merge by a short distillation of all adapters into its factors, and say what that did.

    A merge that is near its adapters already can lose by it, so it first learns from three quarters of the texts; where that keeps
    more on the fourth by the divergence that it learns from (`held_out`, `kept` in the record), it learns anew from all of them.
    With fewer than 12 texts of an adapter nothing is held out.
    """
    held_out: dict[str, float] = {}
    if min(len(rows) for rows in panel.texts.values()) >= FEWEST:
        most, rest = split_off(panel.texts, HELD_OUT)
        tried = distil(panel.with_texts(most, general=False), merge, learns="factors", steps=steps, seed=seed)
        before, after = fidelities(panel.with_texts(rest, general=False), [(merge, 1.0), (tried.adapter, 1.0)])
        held_out = {"merge": before.kept, "repaired": after.kept}
        if not after.kept > before.kept:
            return merge, Repair(steps, held_out, False, tried.first_loss, tried.last_loss)
    done = distil(panel.with_texts(panel.texts, general=False), merge, learns="factors", steps=steps, seed=seed)
    return done.adapter, Repair(steps, held_out, True, done.first_loss, done.last_loss)
