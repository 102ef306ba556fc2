"""Weights, scales and alphas that no update can be multiplied by: refused by one rule, by name, wherever they come from."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import write_adapter
from plait.cli import main
from plait.errors import InputError, RunError, UsageError
from plait.formats.convert import convert
from plait.merging import Change, edit, merge, merge_folders, merge_methods, plan_merge
from plait.merging.words import words_of
from plait.subspaces.start import InitialSettings

RULE = r"expected 0 or a number from 1e-12 to 1e\+12 in size"
TOGETHER = r"is {}, expected at most 1e\+12 in size"


def adapter(name, seed, dtype=torch.float32, scaling=2.0):
    g = torch.Generator().manual_seed(seed)
    factors = {
        f"layers.{i}.q": LoraFactors(
            torch.randn(3, 12, generator=g).to(dtype), torch.randn(10, 3, generator=g).to(dtype), scaling
        )
        for i in range(2)
    }
    return Adapter(name, "base", factors, "CAUSAL_LM")


@pytest.fixture
def pair():
    return [adapter("a", 0), adapter("b", 1)]


@pytest.fixture
def folders(tmp_path):
    for seed, name in enumerate(("a", "b", "a16", "b16")):
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, adapter(name, seed, torch.float16 if "16" in name else torch.float32))
    return tmp_path


@pytest.mark.parametrize("method", ["tsv", "ties", "linear", "task_arithmetic", "cat", "iso_c", None])
@pytest.mark.parametrize("value", [1e40, -1e13, 1e308, 1e-13, 5e-324, float("nan"), float("inf"), True, 10**400])
def test_a_weight_or_scale_out_of_range_is_refused_by_name(pair, method, value):
    with pytest.raises(UsageError, match=f"the weight of 'b' is .*{RULE}"):
        plan_merge(pair, method, weights=[1.0, value])
    with pytest.raises(UsageError, match=f"the weight of 'b' in 'q' is .*{RULE}"):
        plan_merge(pair, method, module_weights={"b": {"q": value}})
    with pytest.raises(UsageError, match=f"^scale is .*{RULE}"):
        plan_merge(pair, method, scale=value)


@pytest.mark.parametrize("method", ["tsv", "ties", "task_arithmetic", "cat"])
def test_a_product_out_of_range_is_refused(pair, method):
    with pytest.raises(UsageError, match="weight times scale times alpha / rank of 'a' " + TOGETHER.format(r"-2e\+15")):
        plan_merge(pair, method, weights=[1e10, 1.0], scale=-1e5)
    with pytest.raises(UsageError, match="weight times alpha / rank of 'b' " + TOGETHER.format(r"2e\+12")):
        plan_merge(pair, method, module_weights={"b": {"q": 1e12}}, scale=1.0)


@pytest.mark.parametrize("method", ["tsv", "task_arithmetic"])
def test_an_alpha_out_of_range_is_refused(pair, method):
    with pytest.raises(InputError, match=r"^b: alpha / rank " + TOGETHER.format(r"1e\+25")):
        plan_merge([pair[0], adapter("b", 1, scaling=1e25)], method)


def test_counts_of_tokens_are_weights_where_a_mean_is_taken(pair):
    """One of 3e11 tokens, one of 1e11: what multiplies the updates is 0.75 and 0.25, and that alone is told to be far or not."""
    by_count, by_share = (merge(pair, "linear", weights=w) for w in ([3e11, 1e11], [0.75, 0.25]))
    for m, f in by_count.adapter.modules.items():
        assert torch.allclose(f.delta(), by_share.adapter.modules[m].delta(), rtol=1e-6)
    assert not by_count.record.beside


@pytest.mark.parametrize("name", sorted(merge_methods()))
def test_what_is_in_range_gives_numbers(name, pair):
    """Squares of what the largest weights give are finite, as norms are taken of them."""
    if merge_methods()[name].needs:
        return
    done = merge(pair, name, weights=[5e11, 1.0], scale=1.0)
    assert all(0 <= f.norm_squared() < float("inf") for f in done.adapter.modules.values())
    assert done.record.verification_error < 1e-3


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"method": "task_arithmetic", "weights": [1.0, -500.0]}, "b's update is multiplied by -500: is that meant?"),
        ({"method": "linear", "weights": [1.0, 500.0]}, None),
        ({"method": "tsv", "scale": 150.0}, "the scale is 150: is that meant?"),
        ({"method": "tsv", "scale": 1.5}, None),
    ],
)
def test_what_is_far_from_every_measured_merge_is_told(folders, options, line):
    done = merge_folders([folders / "a", folders / "b"], folders / "out", **options)
    told = [text for text in words_of(done).splitlines() if "is that meant" in text]
    assert told == ([line] if line else [])


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv", "linear"])
@pytest.mark.parametrize("sixteen", [("a16", "b16", "keep"), ("a", "b", "float16")], ids=["kept", "asked"])
def test_what_float16_does_not_hold_is_refused(folders, method, sixteen):
    *names, dtype = sixteen
    pair = [folders / n for n in names]
    for scale, message in (
        (1e6, "the merge overflows float16"),
        (1e-9, "rounding to float16 takes 100 % of the update"),
    ):
        with pytest.raises(RunError, match=message) as refused:
            merge_folders(pair, folders / "out", method, scale=scale, dtype=dtype)
        assert refused.value.hint == "--dtype float32" and not (folders / "out").exists()
        done = merge_folders(pair, folders / f"wide{scale}", method, scale=scale, dtype="float32")
        assert done.record.verification_error < 1e-3


def test_a_conversion_that_leaves_nothing_is_refused(folders):
    small = adapter("small", 3)
    write_adapter(
        folders / "b", replace(small, modules={m: replace(f, B=f.B * 1e-9) for m, f in small.modules.items()})
    )
    with pytest.raises(RunError, match="rounding to float16 takes 100 % of the update"):
        convert(folders / "b", folders / "short", dtype="float16")
    assert convert(folders / "b", folders / "same", dtype="bfloat16").record.rounding_error < 0.01


@pytest.mark.parametrize("by_difference", [False, True])
def test_an_edit_goes_by_the_same_rule(folders, by_difference):
    merge_folders([folders / "a", folders / "b"], folders / "m", "task_arithmetic", scale=1.0)
    with pytest.raises(UsageError, match=f"the weight of 'b' is .*{RULE}"):
        edit(folders / "m", Change(weights={"b": 1e40}), folders / "o", by_difference=by_difference)
    with pytest.raises(UsageError, match=f"scale is .*{RULE}"):
        edit(folders / "m", Change(scale=1e40), folders / "o")


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["--weights", "1e40,1"], 2),
        (["--weights", "1e40,1", "--method", "ties"], 2),  # once an unexpected error of torch's
        (["--method", "cat", "--weights", "1,1e38"], 2),  # once written, and read by no model
        (["--method", "cat", "--scale", "1e-50"], 2),  # once written as zeros
        (["--weights", "weights.json"], 2),
        (["--method", "cat", "--weights", "1e10,1"], 0),
    ],
)
def test_the_command_line_refuses_in_one_line(folders, monkeypatch, capsys, arguments, exit_code):
    monkeypatch.chdir(folders)
    (folders / "weights.json").write_text(json.dumps({"a": {"q": 1e39}}))
    with pytest.raises(SystemExit) as left:
        main(["merge", "a", "b", "--out", "o", *arguments])
    assert left.value.code == exit_code
    said = capsys.readouterr().err
    assert exit_code == 0 or ("expected 0 or a number from" in said and said.count("\n") == 1)
    assert (folders / "o").exists() == (exit_code == 0)


def test_recipes_and_starts_go_by_the_same_rule(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    recipe = {"models": [{"model": f"base+{n}", "parameters": {"weight": 1e40}} for n in "ab"], "base_model": "base"}
    (folders / "kit.yml").write_text(yaml.safe_dump({**recipe, "merge_method": "task_arithmetic"}))
    with pytest.raises(SystemExit):
        main(["merge", "kit.yml", "--out", "o"])
    assert "the weight of 'a' is 1e+40" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"alpha is 1e\+40"):
        InitialSettings(alpha=1e40)
