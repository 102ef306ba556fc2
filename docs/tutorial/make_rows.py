"""Two csv files and a base to play with: those of the demo."""

from pathlib import Path

import pandas

from plait.demo.run import DATA, demo_base

if not Path("base").exists():  # of the other tutorial
    Path("base").symlink_to(demo_base())
for task in ("clinc", "banking"):
    for split in ("train", "validation"):
        pandas.read_parquet(DATA / f"{task}.{split}.parquet").to_csv(f"{task}.{split}.csv", index=False)
