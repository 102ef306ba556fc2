"""Every byte of a small merge, and of single files, changed once: ``PYTHONPATH=src:. python -P -m benchmarks.trust.flips --to FOLDER``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from benchmarks.trust import Row, write_part
from tests.adapters.test_sealed import KINDS, misread
from tests.test_manifest import a_folder, listed, unnoticed


def main() -> None:
    """Flip one bit, drawn at random, of every byte of every file the manifest lists, and of the manifest; read each time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--sample", type=float, default=1.0, help="share of the bytes, for a quick look")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    drawn, rows = np.random.default_rng(given.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = a_folder(Path(scratch) / "merged", modules=5)
        for file in listed(folder):
            size = (folder / file).stat().st_size
            places = sorted(drawn.choice(size, max(1, round(size * given.sample)), replace=False).tolist())
            noticed, fell = unnoticed(folder, {file: [(place, int(drawn.integers(8))) for place in places]})
            note = f"{noticed} refused with exit code 3, {len(places) - noticed - len(fell)} read as before"
            what = f"a flipped bit in {file} of a merge ({size} bytes): noticed, or nothing that is read changes"
            rows.append(Row(what, len(places), len(places) - len(fell), len(fell), (*fell[:20], note)))
        for kind, (write, read) in KINDS.items():
            path = write(Path(scratch) / f"{kind}.safetensors")
            size = path.stat().st_size
            places = sorted(drawn.choice(size, max(1, round(size * given.sample)), replace=False).tolist())
            noticed, fell = misread(path, read, [(place, int(drawn.integers(8))) for place in places])
            note = f"{noticed} refused with exit code 3, {len(places) - noticed - len(fell)} read as before"
            what = f"a flipped bit in a single file of plait's, {kind} ({size} bytes): noticed, or nothing that is read changes"
            rows.append(Row(what, len(places), len(places) - len(fell), len(fell), (*fell[:20], note)))
    write_part(given.to, "flips", rows, " ".join(["python -P -m benchmarks.trust.flips", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
