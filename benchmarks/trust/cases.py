"""The table of bad inputs, counted: ``PYTHONPATH=src:. python -P -m benchmarks.trust.cases --to FOLDER``."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks.trust import row, write_part

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run tests/robustness and write the part's file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "cases.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(ROOT / "tests/robustness"),
            "-q",
            "-m",
            "",
            f"--junitxml={report}",
        ]
        subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        tests = [t for t in ET.parse(report).iter("testcase") if t.get("name", "").startswith("test_a_bad_input")]
    outcomes = ["" if not list(t.iter("failure")) and not list(t.iter("error")) else str(t.get("name")) for t in tests]
    what = "a bad input: its exit code, one line with file, key and next step, nothing changed, nothing left, 10 s and 1 GB"
    write_part(given.to, "cases", [row(what, outcomes)])


if __name__ == "__main__":
    main()
