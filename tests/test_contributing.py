"""The examples of CONTRIBUTING.md run: the subspace in its registry, the stage on a run's adapters."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from plait.runs import stages
from plait.runs.layout import Layout
from plait.runs.run import run
from plait.runs.waves import final_units
from plait.statistics import Statistics
from plait.subspaces import compute_subspaces, registry
from tests.subspaces.pools import pool

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(title: str) -> str:
    """The first Python example below a heading, whose length a newcomer would have to write."""
    code = re.search(r"```python\n(.*?)```", TEXT.split(f"## {title}\n")[1], flags=re.DOTALL)
    assert code is not None and len(code[1].splitlines()) < 60
    return code[1]


def test_the_subspace_registers_itself_and_takes_the_largest_directions(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry.subspace_methods()))
    exec(compile(example("Adding a subspace"), "CONTRIBUTING.md", "exec"), {})
    statistics: dict[str, Statistics] = pool(3)
    spaces = compute_subspaces("own", statistics, rank=2)
    for task, known in statistics.items():
        (moments,) = known.sites.values()
        moment = moments.second / moments.count  # (32, 32), dense: as methods see it
        for space in spaces[task].values():
            taken = torch.trace(space.basis.double() @ moment @ space.basis.double().T)
            assert torch.isclose(taken, torch.linalg.eigvalsh(moment)[-2:].sum(), rtol=1e-5)


def test_the_stage_measures_a_run_s_adapters(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tasks=["topic"], arms=["kaiming"], merges=["task_arithmetic"])
    layout = Layout(recipe, tmp_path / "out")
    run(recipe, tmp_path / "out", layout=layout, quiet=True)
    names = {**vars(stages), "torch": torch}
    exec(compile(example("Adding a stage"), "CONTRIBUTING.md", "exec"), names)
    result: dict[str, dict[str, float]] = {}
    names["_calibration"](final_units(layout)[0], layout, tmp_path, result)
    assert set(result["gap"]) == {"topic"} and abs(result["gap"]["topic"]) <= 1
