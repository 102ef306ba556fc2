"""How well numbers known before a merge told what the merge cost: measured in the studies, quoted wherever they are shown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """One number's record under TSV-M, over the study tables of docs/results (`predictors` in each JSON file).

    Args:
        encoders, decoder: Smallest and largest rank correlation between the number and the points a task lost by merging, over
            the tables of two encoders and of one decoder; differences between tasks are taken out.
        explained: The largest share of variance that a line fitted to its logarithm explained on arms it had not seen.
    """

    encoders: tuple[float, float]
    decoder: tuple[float, float]
    explained: float


TABLES = 12  # seven of MiniLM and MPNet, five of SmolLM2
RECORDS = {
    "shift": Record((0.18, 0.67), (0.60, 0.86), 0.59),
    "cosine": Record((-0.11, 0.40), (0.05, 0.70), 0.38),
    "norm": Record((-0.22, 0.20), (0.09, 0.37), 0.18),
    "overlap": Record((-0.65, -0.09), (-0.18, 0.54), 0.37),
}


def told(name: str) -> str:
    """Write one number's record as a clause.

    >>> told("cosine")
    'cosine -0.11 to 0.40 on encoders, 0.05 to 0.70 on a decoder'
    """
    record = RECORDS[name]
    (low, high), (lowest, highest) = record.encoders, record.decoder
    return f"{name} {low:.2f} to {high:.2f} on encoders, {lowest:.2f} to {highest:.2f} on a decoder"
