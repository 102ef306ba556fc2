"""The pages of published studies again, from their archives: NAME.md, NAME.json and figures in docs/results.

    python -m benchmarks.pages [NAME ...]

What a page says about where a study was run is taken over from the page that stands there.
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
from pathlib import Path

from plait.report import write_report
from plait.runs.folder import layout_of_folder

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SAID = ("hardware", "executor", "seconds", "software", "command")


def main(names: list[str]) -> None:
    """Write the pages of some studies, or of all that have an archive."""
    for name in names or sorted(p.name.removesuffix(".tar.xz") for p in RESULTS.glob("*.tar.xz")):
        about = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["about"]
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(RESULTS / f"{name}.tar.xz") as packed:
                packed.extractall(folder, filter="data")
            layout = layout_of_folder(Path(folder) / name)
            written = write_report(layout, RESULTS, name=name, about={k: about[k] for k in SAID if k in about})
        written.html.unlink()  # the pages of this folder are Markdown
        print(written.markdown)


if __name__ == "__main__":
    main(sys.argv[1:])
