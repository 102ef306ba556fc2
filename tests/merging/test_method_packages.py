"""The worked example of CONTRIBUTING.md, as a package of somebody else's: found by its entry point, run by the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.disk.store import identity, staged_folder

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = TEXT.partition("## Adding a merging method\n")[2].partition("\n## ")[0]
METHOD, TWIN = re.findall(r"```python\n(.*?)```", SECTION, flags=re.S)
ENTRY = re.findall(r"```toml\n(.*?)```", SECTION, flags=re.S)[0]


def installed(folder: Path, module: str, text: str) -> Path:
    """A package as an installer leaves it: its module, and a record of its entry points."""
    group, point = re.search(r'entry-points\."([\w.]+)"\]\n(\w+ = "\w+")', ENTRY).groups()
    info = folder / f"{module}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + point.replace('"', "").replace("consensus", module) + "\n")
    (folder / f"{module}.py").write_text(text)
    return folder


def plait(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "plait", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)


@pytest.fixture
def adapters(tmp_path) -> list[str]:
    made = []
    for i, name in enumerate("ab"):
        g = torch.Generator().manual_seed(i)
        A, B = torch.randn(2, 6, generator=g), torch.randn(5, 2, generator=g)
        with staged_folder(tmp_path / name, identity("initial", {}, {}, i)) as stage:
            write_adapter(stage, Adapter(name, "base", {"layers.0.q": LoraFactors(A, B)}))
        made.append(str(tmp_path / name))
    return made


def test_a_method_of_another_package_is_found_listed_and_merged_with(adapters, tmp_path):
    packages, out = installed(tmp_path / "site", "consensus", METHOD), tmp_path / "out"
    options = ["--method", "consensus", "--set", "share=0.5", "--weights", "1,2", "--scale", "1"]
    done = plait(packages, "merge", *adapters, *options, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["method"], record["options"]) == ("consensus", {"share": 0.5})
    twin: dict = {"torch": torch}
    exec(TWIN, twin)
    deltas = [read_adapter(folder).modules["layers.0.q"].delta().double() for folder in adapters]
    wanted = twin["consensus"](deltas, [1.0, 2.0], 0.5)
    # of rank 5: the result is cut to R, the sum of the ranks, as every dense result is
    U, S, V = torch.linalg.svd(wanted)
    torch.testing.assert_close(
        read_adapter(out).modules["layers.0.q"].delta().double(), U[:, :4] * S[:4] @ V[:4], atol=1e-5, rtol=1e-4
    )
    assert "consensus" in plait(packages, "ls", "merges").stdout
    refused = plait(
        packages, "merge", *adapters, "--method", "consensus", "--set", "share=2", "--out", str(tmp_path / "x")
    )
    assert refused.returncode == 2 and "share is 2" in refused.stderr
    without = plait(tmp_path, "merge", *adapters, *options, "--out", str(tmp_path / "x"))
    assert without.returncode == 2 and "unknown merging method 'consensus'" in without.stderr


def test_a_package_that_cannot_be_loaded_is_named(adapters, tmp_path):
    packages = installed(tmp_path / "site", "broken", "import nothing_of_that_name\n")
    done = plait(packages, "merge", *adapters, "--method", "tsv", "--out", str(tmp_path / "out"))
    assert done.returncode == 4
    assert "the plug-in 'broken' of broken cannot be loaded: ModuleNotFoundError" in done.stderr
    taken = installed(tmp_path / "other", "again", METHOD.replace('"consensus"', '"ties"'))
    done = plait(taken, "merge", *adapters, "--method", "tsv", "--out", str(tmp_path / "out"))
    assert done.returncode == 4 and "merging method 'ties' is registered twice" in done.stderr


def test_the_worked_example_is_short():
    law = 1
    assert len(METHOD.splitlines()) + len(TWIN.splitlines()) + law < 60
