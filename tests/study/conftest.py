"""The smallest study: tiny base, two tasks, four arms, a joint reference, one repair, one ablation."""

from __future__ import annotations

import pytest

from plait.recipes.recipe_file import parse_recipe
from tests.conftest import tiny_raw


def raw_study(base, root):
    raw = tiny_raw(base, "bert", root, ["topic", "grade"])
    raw |= {
        "arms": [
            "kaiming",
            {"name": "kaiming_early", "like": "kaiming", "subspace": "kaiming", "snapshot": 2},
            {"name": "contrastive", "options": {"rho": 0.1}},
            {"name": "joint", "subspace": "kaiming", "joint": True, "rank": 4},
        ],
        "merges": ["task_arithmetic", "regmean"],
        "evaluation": {"scales": [0.5, 1.0], "batch_size": 16},
        "training": {"steps": 4, "batch_size": 8, "lr": 0.02},
        "rates": [0.01, 0.03],
        "tuning_seed": 9,
        "tuning_rows": 6,
        "grid_rows": 6,
        "repair": {"arms": ["kaiming"], "merge": "task_arithmetic", "steps": 2},
        "variants": [{"name": "rank4", "set": {"lora.rank": 4}, "arms": ["contrastive"], "merges": ["regmean"]}],
        "seeds": [0, 1],
    }
    return raw


@pytest.fixture
def small_study(tiny_base, tmp_path):
    """small_study(seeds=[0]) -> a checked study whose data lie in this test's folder."""

    def make(**changed):
        return parse_recipe({**raw_study(tiny_base("bert"), tmp_path / "data"), **changed}, "small")

    return make
