"""The units of work of a recipe: what each is, in coordinates that fit into a line of JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from plait.border.checked import Json

STATISTICS, TRAIN, ALONE, MERGE, FEATURES = "statistics", "train", "alone", "merge", "features"
REPAIR, REPAIRED = "repair", "repaired"
DIVERGED = "diverged"  # in a result: why a training of the sweep, or a score of it, has nothing else
TUNING, FOLDS = "tuning", "folds"


@dataclass(frozen=True, slots=True)
class Unit:
    """One result, by what it is about; JSON holds it, and with the recipe it says everything.

    Args:
        stage: statistics, train, alone, merge, features, repair (a merge trained further) or repaired (its scores).
        seed: Of data order, heads, samples, subsets.
        arm: Name of an arm.
        rate: Learning rate.
        step: Which moment of the training; 0 for its end.
        merge: Name of a merge.
        split: Which rows are scored: "tuning" or "folds".
        variant: Name of an ablation; "" for the study itself.
        pool, samples: Of statistics.
        scale: Of the merge that a repair starts from.
    """

    stage: str
    seed: int
    arm: str = ""
    rate: float = 0.0
    step: int = 0
    merge: str = ""
    split: str = ""
    variant: str = ""
    pool: str = ""
    samples: int = 0
    scale: float = 0.0

    @property
    def label(self) -> str:
        """What a person reads."""
        rate = f"lr {self.rate:g}" if self.rate else ""
        parts = [self.variant, self.stage, self.arm, rate, self.merge, f"seed {self.seed}"]
        return " ".join(p for p in parts if p)

    def to_json(self) -> Json:
        """Coordinates that are set."""
        return {k: v for k, v in asdict(self).items() if v or k == "seed"}
