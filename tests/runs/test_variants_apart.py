"""A variant that sets the base, or which rows are read and how far, is run on that base and those rows, not on the recipe's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from plait.disk.store import read_manifest
from plait.recipes.recipe_file import parse_recipe
from plait.runs.inputs import is_read_alike, within
from plait.runs.layout import Layout
from plait.runs.run import run
from plait.runs.units import ALONE, FOLDS, MERGE, TRAIN, Unit
from plait.runs.waves import result
from tests.conftest import tiny_raw
from tests.tiny import save_model

OWN = Unit(TRAIN, 0, "kaiming", 0.02, variant="v")


@pytest.fixture
def varied(tiny_base, tmp_path):
    """varied({key: value}) -> a recipe with one variant, which sets these."""
    raw = tiny_raw(tiny_base("bert"), "bert", tmp_path / "data", ["topic"])
    raw |= {"arms": ["kaiming"], "merges": ["task_arithmetic"]}

    def make(**settings):
        return parse_recipe({**raw, "variants": [{"name": "v", "set": settings, "arms": ["kaiming"]}]}, "varied")

    return make


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"lora.rank": 4}, True),
        ({"statistics.samples": 8}, True),
        ({"data.train_rows": 9}, True),
        ({"base.dtype": "bfloat16"}, False),
        ({"base.four_bits": "nf4"}, False),
        ({"data.max_length": 8}, False),
        ({"data.validation_rows": 10}, False),
        ({"tasks.topic.metrics": ["f1"]}, False),
    ],
)
def test_a_variant_shares_what_is_loaded_where_it_is_the_same_and_nothing_else(varied, tmp_path, settings, shares):
    layout = Layout(varied(**settings), tmp_path / "out")
    here = layout.of(OWN)
    assert (here.session.evaluator is layout.session.evaluator) is shares
    base, data = here.recipe.base, here.recipe.data
    evaluator = here.session.evaluator
    assert (evaluator.base.dtype, evaluator.base.four_bits, evaluator.max_length) == (
        base.dtype,
        base.four_bits,
        data.max_length,
    )
    assert len(evaluator.examples["topic"]) == len(here.labels("topic"))
    assert evaluator.tasks["topic"].metrics == here.tasks["topic"].metrics


def test_a_base_in_four_bits_is_another_than_the_one_that_a_folder_was_run_on(varied):
    recipe = varied(**{"lora.rank": 4})
    four = recipe.model_copy(update={"base": recipe.base.model_copy(update={"four_bits": "nf4"})})
    assert within(recipe, recipe) and is_read_alike(recipe, recipe) and not within(four, recipe)


@pytest.mark.parametrize("fleet", ["always", "never"])
def test_a_variant_on_another_base_is_what_a_recipe_of_that_base_is(varied, tmp_path, fleet):
    other = save_model(tmp_path / "other", "bert", seed=5)
    recipe = varied(**{"base.model": str(other)}).model_copy(update={"fleet": fleet})
    run(recipe, tmp_path / "varied", quiet=True)
    plain = recipe.model_copy(update={"variants": [], "base": recipe.base.model_copy(update={"model": str(other)})})
    run(plain, tmp_path / "plain", quiet=True)
    varied_layout, plain_layout = Layout(recipe, tmp_path / "varied"), Layout(plain, tmp_path / "plain")
    for unit in (
        replace(OWN, stage=ALONE, split=FOLDS),
        replace(OWN, stage=MERGE, merge="task_arithmetic", split=FOLDS),
    ):
        one, two = result(varied_layout, unit), result(plain_layout, replace(unit, variant=""))
        assert {k: v for k, v in one.items() if k in ("A", "B", "grid", "halves", "delta_norm")} == {
            k: v for k, v in two.items() if k in ("A", "B", "grid", "halves", "delta_norm")
        }
    losses = [
        read_manifest(layout.of(unit).path(unit) / "topic")["result"]["losses"]["curve"]
        for layout, unit in ((varied_layout, OWN), (plain_layout, replace(OWN, variant="")))
    ]
    assert np.allclose(*losses)
