"""Repairing a merge: label-free distillation of many adapters into it, kept where texts that were held out say that it helped."""

from __future__ import annotations

import time

from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.fidelity.panel import Panel
from plait.fidelity.record import Look, Repair
from plait.fidelity.score import fidelities
from plait.fidelity.texts import FEWEST, split_off
from plait.learning.distil import Stopping, distil
from plait.learning.learning_state import KeptLearning
from plait.learning.losses import loss_of
from plait.learning.on_policy import OnPolicyLoss
from plait.learning.teachers import DistillationLoss
from plait.progress import OnProgress, in_words

# Texts of each adapter from which a repair of classifiers is worth it. With 100 of each (75 to learn from) it took more than it gave, also
# where the texts held out said otherwise; with 400 and 500 it gave every time (docs/results/existing-texts.md). Between, nobody measured.
TEXTS_TO_REPAIR = 300
# Weight of the layers' outputs beside the answers.
LAYERS = 0.1
BATCH = 8


def repaired(
    panel: Panel,
    merge: Adapter,
    steps: int,
    seed: int = 0,
    *,
    layers: float = LAYERS,
    on_policy: bool = False,
    rate: float | None = None,
    relative: bool = True,
    keeping: KeptLearning | None = None,
    on_progress: OnProgress = lambda _: None,
) -> tuple[Adapter, Repair]:
    """Repair a merge by distilling all adapters into its factors, without labels, and say what that did.

    It learns from three quarters of the texts, and the fourth is looked at every few steps: it stops where that says for a while that
    the merge comes no closer to the adapters, and the best merge that was seen is the result; the merge itself, where none was
    better. Closeness is 1 - KL(adapter || merge) / KL(adapter || base) there (`Fidelity.kept`), the divergence that it learns from:
    *followed*, which candidates are ranked by, falls while a repair makes a merge less sure of itself, though it answers more like
    its adapters (docs/results/existing-fitted.md). With fewer than 12 texts of an adapter nothing is held out, and all steps are taken.

    Args:
        panel: Base, adapters and texts.
        merge: Where to start, its scale folded in.
        steps: Steps at most; 0 changes nothing.
        seed: Seed of the order of the texts.
        layers: Weight of the distance of the layers' outputs beside the answers'; 0 to leave them out.
        on_policy: Whether the merge writes after the prompts and each text's adapter judges its tokens (`OnPolicyLoss`), in place of
            showing it what the adapters say; causal adapters only.
        rate: Rate of Adam; see `plait.learning.distil.RATES`.
        relative: Whether it is relative to the root mean square of each factor.
        keeping: Where it goes on from, and is kept between its steps.
        on_progress: Called with what is being done.

    Cost: at most `steps` forward and backward passes on adapters x 8 texts, two passes over all texts before, and one over a quarter
    of them every 20 steps.
    """
    panel = panel.with_texts(panel.texts, general=False)
    if steps == 0 or min(len(rows) for rows in panel.texts.values()) < FEWEST:
        loss = _loss(panel, layers, on_policy, seed) if steps else None
        done = distil(
            panel, merge, learns="factors", steps=steps, batch=BATCH, rate=rate, relative=relative, seed=seed, loss=loss,
            keeping=keeping,
        )  # fmt: skip
        return done.adapter, Repair(
            steps, {}, steps > 0, done.first_loss, done.last_loss, most=steps, on_policy=on_policy
        )
    most, rest = split_off(panel.texts)
    judged = panel.with_texts(rest)

    def closeness(adapter: Adapter) -> float:
        return fidelities(judged, [(adapter, 1.0)])[0].kept

    before = closeness(merge)
    learning = panel.with_texts(most)
    begun, taken = time.perf_counter(), keeping.steps if keeping else 0

    def tell(look: Look) -> None:
        left = (time.perf_counter() - begun) * (steps - look.step) / (look.step - taken)
        more = f", at most {in_words(left)} left" if look.step < steps else ""
        on_progress(
            f"  {look.step} of at most {plural(steps, 'step')}: closeness {before:.3f} -> {look.kept:.3f}{more}"
        )

    done = distil(
        learning, merge, learns="factors", steps=steps, batch=BATCH, rate=rate, relative=relative, seed=seed,
        loss=_loss(learning, layers, on_policy, seed), stopping=Stopping(closeness, on_look=tell), keeping=keeping,
    )  # fmt: skip
    after = max(look.kept for look in done.looks)
    record = Repair(
        done.steps, {"merge": before, "repaired": after}, after > before, done.first_loss, done.last_loss,
        most=steps, on_policy=on_policy, looks=(Look(0, before), *done.looks),
    )  # fmt: skip
    return (done.adapter if record.kept else merge), record


def _loss(panel: Panel, layers: float, on_policy: bool, seed: int) -> DistillationLoss:
    return OnPolicyLoss(panel, seed) if on_policy else loss_of(panel, layers)
