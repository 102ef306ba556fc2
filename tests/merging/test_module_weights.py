"""Weights by module: a file of patterns gives what the same weights give by hand, in every module, and is checked strictly."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.cli import main
from plait.errors import InputError, UsageError
from plait.merging import merge, merge_folders
from plait.merging.changes import Change
from plait.merging.editing import edit
from plait.merging.module_weights import read_module_weights, weights_of_modules

MODULES = {
    f"model.layers.{i}.{n}": s for i in (0, 1, 10) for n, s in (("self_attn.q_proj", (6, 5)), ("mlp.up_proj", (7, 5)))
}
TABLE = {
    "a": {r"layers\.0\..*": 0.5, "q_proj": -1.5, "default": 2.0},
    "b": {"model.layers.10.mlp.up_proj": 0.0, r"layers\.(0|1)\.self_attn\.q_proj": 0.25},
}
# by hand: module -> (weight of a, weight of b)
WANTED = {
    "model.layers.0.self_attn.q_proj": (0.5, 0.25),
    "model.layers.0.mlp.up_proj": (0.5, 1.0),
    "model.layers.1.self_attn.q_proj": (-1.5, 0.25),
    "model.layers.1.mlp.up_proj": (2.0, 1.0),
    "model.layers.10.self_attn.q_proj": (-1.5, 1.0),
    "model.layers.10.mlp.up_proj": (2.0, 0.0),
}


def adapter(name, seed, modules=MODULES, rank=2):
    g = torch.Generator().manual_seed(seed)
    made = {
        m: LoraFactors(torch.randn(rank, i, generator=g), torch.randn(o, rank, generator=g), 0.5)
        for m, (o, i) in modules.items()
    }
    return Adapter(name, "base", made, "CAUSAL_LM")


@pytest.fixture
def folders(tmp_path):
    found = []
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, adapter(name, seed))
        found.append(str(tmp_path / name))
    return found


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_the_file_gives_what_the_weights_give_by_hand(tmp_path, folders, suffix):
    file = tmp_path / f"w{suffix}"
    file.write_text(json.dumps(TABLE))  # JSON is YAML
    with pytest.raises(SystemExit) as ended:
        main(["merge", *folders, "--weights", str(file), "--out", str(tmp_path / "m"), "--json"])
    assert ended.value.code == 0
    found = read_adapter(tmp_path / "m")
    one, two = adapter("a", 0).modules, adapter("b", 1).modules
    for module, (x, y) in WANTED.items():
        wanted = x * one[module].delta(torch.float64) + y * two[module].delta(torch.float64)
        torch.testing.assert_close(found.modules[module].delta(torch.float64), wanted, rtol=1e-6, atol=1e-6)
    record = json.loads((tmp_path / "m" / "plait.json").read_text())
    assert record["options"]["module_weights"] == TABLE and record["result"]["module_weights"] == TABLE
    assert record["result"]["verification_error"] < 1e-6


@pytest.mark.parametrize("method", ["linear", "ties", "tsv", "dare_ties", "breadcrumbs", "svd"])
def test_every_method_takes_a_modules_weights_as_if_it_were_alone(method):
    """One module merged by itself with its weights is that module of the whole merge."""
    adapters = [adapter("a", 0), adapter("b", 1)]
    options = {"scope": "module"} if method == "ties" else {}
    whole = _merged(adapters, method, options)
    for module, weights in WANTED.items():
        if sum(weights) == 0:
            continue
        alone = [Adapter(a.name, "base", {module: a.modules[module]}, "CAUSAL_LM") for a in adapters]
        wanted = merge(alone, method, options=options, weights=weights, scale=1.0).adapter.modules[module]
        torch.testing.assert_close(
            whole[module].delta(torch.float64), wanted.delta(torch.float64), rtol=1e-5, atol=1e-6
        )


def _merged(adapters, method, options):
    from plait.merging import plan_merge

    plan = plan_merge(adapters, method, options=options, module_weights=TABLE, scale=1.0)
    done = plan.run("m")
    assert plan.verification_error(done.adapter.modules) < 1e-4
    return done.adapter.modules


def test_a_single_adapter_of_weight_1_in_name_only(tmp_path, folders):
    merge_folders(folders[:1], tmp_path / "m", module_weights={"a": {"up_proj": 3.0}})
    one = adapter("a", 0).modules
    for module, f in read_adapter(tmp_path / "m").modules.items():
        factor = 3.0 if module.endswith("up_proj") else 1.0
        torch.testing.assert_close(f.delta(), factor * one[module].delta())


def test_it_is_part_of_the_identity(tmp_path, folders):
    merge_folders(folders, tmp_path / "m", module_weights={"a": {"q_proj": 3.0}})
    assert merge_folders(folders, tmp_path / "m", module_weights={"a": {"q_proj": 3.0}}).reused
    with pytest.raises(UsageError, match="module_weights"):
        merge_folders(folders, tmp_path / "m", module_weights={"a": {"q_proj": 2.0}})
    with pytest.raises(UsageError, match="settings"):
        merge_folders(folders, tmp_path / "m", "task_arithmetic", scale=1.0)


def test_edits_keep_them(tmp_path, folders):
    merge_folders(folders, tmp_path / "m", module_weights=TABLE)
    edit(tmp_path / "m", Change(remove=["b"]), tmp_path / "less")
    merge_folders(folders[:1], tmp_path / "alone", module_weights={"a": TABLE["a"]})
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("less", "alone"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    edit(tmp_path / "m", Change(weights={"a": 0.5}), tmp_path / "flat")
    record = json.loads((tmp_path / "flat" / "plait.json").read_text())
    assert record["options"]["module_weights"] == {"a": {"default": 0.5}, "b": TABLE["b"]}
    with pytest.raises(UsageError, match="by module"):
        edit(tmp_path / "m", Change(remove=["b"]), tmp_path / "d", by_difference=True)


@pytest.mark.parametrize(
    ("table", "kind", "message"),
    [
        ({"c": {"q_proj": 1.0}}, UsageError, "names 'c'"),
        ({"a": {"k_proj": 1.0}}, UsageError, "no module of 'a' follows the pattern 'k_proj'"),
        ({"a": {"q": 1.0}}, UsageError, "follows the pattern"),
        ({"a": {".*": 1.0, "q_proj": 2.0}}, UsageError, "earlier pattern"),
        ({"a": {"(": 1.0}}, InputError, "regex"),
    ],
)
def test_what_hits_nothing_is_refused(table, kind, message):
    adapters = [adapter("a", 0), adapter("b", 1)]
    with pytest.raises(kind, match=message):
        weights_of_modules(table, adapters, list(MODULES))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {q: x}", "number"), ("a: {q: .nan}", "number"), ("a: {q: true}", "number"), ("a: {q: [1]}", "number"), ("[1]", "object"),
        ("a: null", "number"), ("{}", "no adapter"), ("a: {1: 2}", "key"), ("a: {q: 1, q: 2}", "YAML"), ("a: {q: 1", "YAML"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_an_input_error(tmp_path, text, message):
    (tmp_path / "w.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_module_weights(tmp_path / "w.yaml")


def test_a_pattern_that_would_take_forever_does_not(tmp_path):
    long = "x" * 180
    modules = {f"{long}.q_proj": (6, 5)}
    adapters = [adapter("a", 0, modules)]
    with pytest.raises((InputError, UsageError)):
        weights_of_modules({"a": {"(.*.*.*.*.*.*)*zz": 1.0}}, adapters, list(modules))


@pytest.mark.parametrize(("method", "share"), [("task_arithmetic", 0.5), ("linear", 0.25)])
def test_what_auto_learnt_can_be_fed_back(tmp_path, folders, method, share):
    learnt = {m: [x + 2, y + 2] for m, (x, y) in WANTED.items()}
    auto = tmp_path / "auto"
    auto.mkdir()
    chosen = {"method": method, "calibrate": None, "scale": 0.5, "weights": learnt}
    (auto / "plait.json").write_text(json.dumps({"options": {}, "result": {"chosen": chosen, "tasks": ["a", "b"]}}))
    table = read_module_weights(auto / "plait.json")
    merge_folders(folders, tmp_path / "m", module_weights=table)
    one, two = adapter("a", 0).modules, adapter("b", 1).modules
    for module, f in read_adapter(tmp_path / "m").modules.items():
        x, y = learnt[module]
        wanted = share * (x * one[module].delta(torch.float64) + y * two[module].delta(torch.float64))
        torch.testing.assert_close(f.delta(torch.float64), wanted, rtol=1e-6, atol=1e-6)
    chosen["method"] = "tsv"
    (auto / "plait.json").write_text(json.dumps({"options": {}, "result": {"chosen": chosen, "tasks": ["a", "b"]}}))
    with pytest.raises(UsageError, match="whose parts are no adapters"):
        read_module_weights(auto / "plait.json")


def test_both_kinds_of_weights_exclude_each_other(tmp_path, folders):
    with pytest.raises(UsageError, match="exclude"):
        merge_folders(folders, tmp_path / "m", weights=[1.0, 1.0], module_weights=TABLE)
