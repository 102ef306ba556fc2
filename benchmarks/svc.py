"""Whether SVC would be chosen by `merge auto`: methods with pico, with SVC and with neither, each at its best scale, by fidelity on texts.

python benchmarks/svc.py --base MODEL clinc=ADAPTER=TEXTS.csv:sentence snli=ADAPTER=TEXTS.csv:premise,hypothesis ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plait.adapters.peft_format import read_adapter
from plait.choosing.candidates import Recipe, merged_by
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.score import fidelities
from plait.fidelity.texts import read_place
from plait.model.base import BaseModel

METHODS = ("task_arithmetic", "tsv", "iso_c", "knots")
CALIBRATIONS = (None, "pico", "svc")
SCALES = (0.4, 0.6, 0.9, 1.3, 2.0, 3.0)


def main() -> None:
    """Print a line for each method and calibration: its best scale and its score there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--texts", type=int, default=24, help="of each adapter")
    parser.add_argument("adapters", nargs="+", help="NAME=FOLDER=FILE:COLUMNS")
    chosen = parser.parse_args()
    told = [item.split("=", 2) for item in chosen.adapters]
    adapters = [read_adapter(Path(folder), name=name) for name, folder, _ in told]
    texts = {name: read_place(place, chosen.texts) for name, _, place in told}
    panel = Panel(BaseModel(chosen.base, device="cpu"), parts_of(adapters), texts)
    for method in METHODS:
        made = [merged_by(Recipe(method, calibration), adapters, {}) for calibration in CALIBRATIONS]
        scores = [f.score for f in fidelities(panel, [(m, s) for m in made for s in SCALES])]
        for i, calibration in enumerate(CALIBRATIONS):
            mine = scores[i * len(SCALES) : (i + 1) * len(SCALES)]
            at = max(range(len(SCALES)), key=mine.__getitem__)
            print(f"{method} + {calibration or 'nothing'}: {mine[at]:.4f} at {SCALES[at]:g}", flush=True)


if __name__ == "__main__":
    main()
