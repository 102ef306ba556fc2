"""mergekit's YAML dialect: what is understood, and what is refused rather than ignored."""

from __future__ import annotations

import pytest
from tests.merging.test_folders import saved

from plait.errors import InputError, UsageError
from plait.merging import merge_folders, merge_methods
from plait.merging.mergekit import _METHODS, from_mergekit, read_mergekit_config
from plait.merging.registry import find_method
from plait.options import checked_options

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
    read = read_mergekit_config(tmp_path / "m.yaml")
    assert read == {
        "folders": [str(a), str(b)],
        "method": "ties",
        "options": {"scope": "module", "density": 0.4, "agreeing": "sum"},
        "weights": [0.5, 1.5],
        "scale": 0.8,
        "base": "base",
    }
    done = merge_folders(read.pop("folders"), tmp_path / "out", **read)
    assert done["method"] == "ties" and done["options"]["agreeing"] == "sum"


def test_every_shared_method_gives_valid_options():
    assert {name for name, _ in _METHODS.values()} <= set(merge_methods())
    for method, options in _METHODS.values():
        checked_options(find_method(method), options)


def recipe(**changes):
    models = [{"model": "base+x"}, {"model": "base+y"}]
    return {"models": models, "merge_method": "linear", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slices": []}, "slices"),
        ({"merge_metod": "linear"}, "did you mean 'merge_method'"),
        ({"merge_method": "tias"}, "did you mean 'ties'"),
        ({"merge_method": "passthrough"}, "passthrough"),
        ({"models": [{"model": "whole", "parameters": {"weight": 1}}]}, "whole model"),
        ({"models": [{"model": "base"}]}, "no model is base"),
        ({"models": [{"model": "base+x"}, {"model": "other+y"}], "base_model": "base"}, "different bases"),
        ({"models": [{"model": "base+x"}, {"model": "other+y"}]}, "different bases"),
        ({"parameters": {"weight": [0.1, 0.9]}}, "varies by layer"),
        ({"parameters": {"normalize": False}}, "normalize: false"),
        ({"merge_method": "ties", "parameters": {"rescale": True}}, "nothing like rescale"),
    ],
)
def test_what_plait_does_not_do_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        from_mergekit(recipe(**changes))


def test_densities_that_differ_are_refused():
    models = [{"model": "base+x", "parameters": {"density": 0.1}}, {"model": "base+y", "parameters": {"density": 0.2}}]
    with pytest.raises(UsageError, match="density differs"):
        from_mergekit(recipe(merge_method="ties", models=models))


@pytest.mark.parametrize("text", ["- a\n", "a: 1\na: 2\n", "a: [\n", "a: !!python/object:os.system x\n", "\t: x"])
def test_what_is_no_recipe_is_an_input_error(tmp_path, text):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(InputError):
        read_mergekit_config(tmp_path / "m.yaml")
