"""mergekit's YAML dialect: what is understood, and what is refused rather than ignored."""

from __future__ import annotations

import pytest
from tests.merging.test_folders import saved

from plait.errors import InputError, UsageError
from plait.merging import MergeSpec, merge_folders
from plait.merging.mergekit import from_mergekit, read_mergekit_config

TIES = """
models:
  - model: base
  - model: base+{a}
    parameters: {{weight: 0.5}}
  - model: base+{b}
merge_method: ties
base_model: base
parameters:
  density: 0.4
  weight: 1.5
  normalize: false
  lambda: 0.8
  int8_mask: true
dtype: float32
"""


def test_a_recipe_runs(tmp_path):
    a, b = saved(tmp_path / "a", 0), saved(tmp_path / "b", 1)
    (tmp_path / "m.yaml").write_text(TIES.format(a=a, b=b))
    folders, spec = read_mergekit_config(tmp_path / "m.yaml", MergeSpec("ties", rank=6, seed=3, scale=9.0))
    assert folders == [str(a), str(b)]
    assert spec == MergeSpec(
        "sparse_arithmetic",
        {"rescale": False, "elect": True, "normalise": False, "drop": "small", "density": 0.4},
        weights=[0.5, 1.5],
        scale=0.8,
        base="base",
        rank=6,
        seed=3,
    )
    done = merge_folders(folders, tmp_path / "out", spec)
    assert done.record.method == "sparse_arithmetic" and done.record.options["elect"]
    dense = merge_folders([str(a), str(b)], tmp_path / "again", spec)
    assert dense.record.tasks == (a.name, b.name)


UNWEIGHTED = [{"model": "base+x"}, {"model": "base+y"}]

THREE = [{"model": f"base+{n}", "parameters": {"weight": 1}} for n in "xyz"]


def recipe(**changes):
    models = [{"model": "base+x", "parameters": {"weight": 1}}, {"model": "base+y", "parameters": {"weight": 2}}]
    return {"models": models, "merge_method": "linear", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slices": []}, "slices"),
        ({"merge_metod": "linear"}, "did you mean 'merge_method'"),
        ({"merge_method": "tias"}, "did you mean 'ties'"),
        ({"merge_method": "passthrough"}, "passthrough"),
        ({"models": [{"model": "whole", "parameters": {"weight": 1}}, *UNWEIGHTED]}, "whole model"),
        ({"models": [{"model": "base"}]}, "no model is base"),
        ({"models": [{"model": "base+x"}, {"model": "other+y"}], "base_model": "base"}, "different bases"),
        ({"models": [{"model": "base+x"}, {"model": "other+y"}]}, "different bases"),
        ({"parameters": {"weight": [0.1, 0.9]}}, "varies by layer"),
        ({"parameters": {"normalize": False}}, "the base itself changes"),
        ({"parameters": {"t": 0.5}}, "nothing like t of linear"),
        ({"merge_method": "ties"}, "needs a base_model"),
        ({"merge_method": "sce", "base_model": "base"}, "nothing like weight of sce"),
        ({"merge_method": "karcher", "models": UNWEIGHTED}, "whole weights"),
        ({"merge_method": "slerp", "models": UNWEIGHTED, "base_model": "base"}, "whole weights"),
        ({"merge_method": "nuslerp"}, "whole weights"),
        ({"merge_method": "multislerp"}, "whole weights"),
        ({"merge_method": "nuslerp", "base_model": "base", "parameters": {"nuslerp_flatten": False}}, "row by row"),
        ({"merge_method": "multislerp", "base_model": "base", "parameters": {"normalize_weights": False}}, "sum is 1"),
        ({"merge_method": "multislerp", "base_model": "base", "models": THREE}, "more than two"),
        ({"merge_method": "nuslerp", "base_model": "base", "models": THREE}, "joins two models, not 3"),
        ({"models": UNWEIGHTED}, "no weight"),
        ({"models": UNWEIGHTED, "merge_method": "ties", "base_model": "base"}, "no weight"),
        ({"models": [{"model": "base"}, {"model": "base+x", "parameters": {"weight": 1}}]}, "base has no weight"),
        ({"base_model": "base"}, "base has no weight"),
        ({"models": [UNWEIGHTED[0]] * 2}, "listed twice"),
        ({"merge_method": "ties", "base_model": "base+x"}, "one of the models, not the base"),
        ({"merge_method": "linear", "base_model": "base+x"}, "leave base_model out"),
        ({"merge_method": "ties", "base_model": "base+z"}, "different bases"),
        (
            {"merge_method": "slerp", "models": UNWEIGHTED, "base_model": "base+x"},
            "whole weights in mergekit, from its",
        ),
        ({"merge_method": "karcher", "models": UNWEIGHTED, "base_model": "base+y"}, "whole weights in mergekit, from"),
        ({"merge_method": ["ties"]}, "merge_method"),
        ({"parameters": {"weight": 10**400}}, "weight"),
        ({"parameters": {1: 2}}, "a key of parameters"),
        ({"dtype": "int3"}, "dtype"),
    ],
)
def test_what_plait_does_not_do_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        from_mergekit(recipe(**changes))


def test_densities_that_differ_are_refused():
    models = [{"model": f"base+{n}", "parameters": {"density": d, "weight": 1}} for n, d in (("x", 0.1), ("y", 0.2))]
    with pytest.raises(UsageError, match="density differs"):
        from_mergekit(recipe(merge_method="ties", models=models, base_model="base"))


@pytest.mark.parametrize("text", ["- a\n", "a: 1\na: 2\n", "a: [\n", "a: !!python/object:os.system x\n", "\t: x"])
def test_what_is_no_recipe_is_an_input_error(tmp_path, text):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(InputError):
        read_mergekit_config(tmp_path / "m.yaml")
