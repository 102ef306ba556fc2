"""A source package, unpacked and not built: what lies in it beside the package itself is all that is wanted.

python benchmarks/serving/source.py NAME VERSION --to DIR
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name")
    p.add_argument("version")
    p.add_argument("--to", required=True, type=Path)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as work:
        # --no-binary for this package alone: its build tools, which pip wants for its metadata, come built.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", a.name]
        subprocess.run([*command, "--dest", work, f"{a.name}=={a.version}"], check=True)
        with tarfile.open(next(Path(work).glob("*.tar.gz"))) as archive:
            archive.extractall(a.to, filter="data")


if __name__ == "__main__":
    main()
