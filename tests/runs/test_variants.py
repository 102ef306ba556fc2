"""What a variant sets is checked as a recipe is: one line that names file, variant and key, and never a variant without its arms."""

from __future__ import annotations

import pytest

from plait.errors import UsageError
from plait.recipes.recipe_file import parse_recipe, variant_of
from tests.fuzz.seeds import WHOLE
from tests.fuzz.targets import _loaded

RAW = {
    "base": {"model": "m"},
    "tasks": ["sst2", "rte"],
    "lora": {"target_modules": ["query"]},
    "arms": ["kaiming", "osrm", {"name": "far", "subspace": "osrm", "like": "osrm"}],
    "training": {"steps": 3},
    "merges": ["ties"],
}


def with_variant(settings: dict[str, object], *arms: str) -> dict[str, object]:
    return {**RAW, "variants": [{"name": "v", "set": settings, "arms": [*arms] or ["osrm"]}]}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"arms": 5}, "arms: Input should be a valid list (found 5)"),
        ({"arms": None}, "arms: Input should be a valid list (found None)"),
        ({"arms": ["kaiming"]}, "what it sets leaves no arm 'osrm'"),
        ({"arms.far.rank": 0}, "arms.2.rank: Input should be greater than or equal to 1 (found 0)"),
        ({"merges": {}}, "merges: Input should be a valid list"),
        ({"tasks.sst2.text": ["a"]}, "tasks.sst2.text: sst2 is not a mapping, nor an entry described under that name"),
        ({"a\x1b[31m.b": 1}, "unknown key 'a"),
    ],
)
def test_what_makes_no_recipe_is_told_with_file_and_variant(settings, said):
    with pytest.raises(UsageError) as raised:
        parse_recipe(with_variant(settings), "r.yaml")
    text = str(raised.value)
    assert text.startswith("r.yaml: variant v: ") and said in text and text.isprintable()


def test_an_arm_brings_the_one_whose_rate_it_takes():
    recipe = parse_recipe(with_variant({"lora.r": 3, "training.learning_rate": 0.5}, "far"), "r.yaml")
    variant = variant_of(recipe, "v")
    assert [a.name for a in variant.named_arms] == ["osrm", "far"]
    assert (variant.adapted.rank, variant.training_of(None).lr, variant.variants) == (3, 0.5, [])
    assert [m.name for m in variant.merges] == ["ties"] and variant.seeds == recipe.seeds[:1]


def test_a_recipe_that_says_everything_is_read():
    recipe = parse_recipe(_loaded(WHOLE), "whole.yaml")
    assert (recipe.adapted.rank, recipe.base.dtype, recipe.training_of(recipe.arm("held")).steps) == (2, "bfloat16", 6)
    variant = variant_of(recipe, "wide")
    assert [a.name for a in variant.named_arms] == ["mine", "held"] and variant.named_arms[0].rates is None
    assert (variant.adapted.rank, variant.tasks[0].text, variant.seeds) == (3, ["one"], [4])
