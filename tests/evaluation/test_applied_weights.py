"""Adapters of fused experts and routers on a live model: what PEFT makes of them, and not a bit left behind; who refuses them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch

from plait.adapters.lora import EXPERT, LoraFactors
from plait.adapters.peft_format import read_adapter
from plait.choosing import costs
from plait.choosing.proxy import cosines, terms
from plait.errors import InputError
from plait.model.applied import applied, without_layers
from tests.command import call
from tests.mixtures import FUSED, adapter, difference, loaded, logits, mixture
from tests.tiny import save_tokenizer

ROUTER = {"mixtral": "mlp.gate.weight", "qwen3_moe": "mlp.gate.weight", "gpt_oss": "mlp.router.weight"}


def options(name: str, *parameters: str) -> dict:
    return {"target_modules": ["q_proj"], "target_parameters": list(parameters or (*FUSED, ROUTER[name]))}


@pytest.mark.parametrize("name", sorted(ROUTER))
def test_what_peft_makes_of_experts_and_routers(tmp_path, name):
    folder = adapter(mixture(name), tmp_path / "a", 1, **options(name))
    model, found = mixture(name), read_adapter(folder)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bare = logits(model)
    with applied(model, found):
        assert difference(logits(model), logits(loaded(mixture(name), folder))) < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), bare) and all(p.requires_grad for p in model.parameters())
    half = replace(found, modules={m: replace(f, scaling=f.scaling / 2) for m, f in found.modules.items()})
    with applied(model, found, 0.5):
        scaled = logits(model)
    with applied(model, half):
        assert difference(scaled, logits(model)) < 1e-5 < difference(scaled, bare)
    assert any(n.endswith("q_proj") for n in found.modules)
    assert not any(n.endswith("q_proj") for n in without_layers(model, found))


@pytest.mark.parametrize("parameters", [("mlp.gate.weight",), ("experts.down_proj",), ("q_proj.weight",)])
def test_a_part_of_a_mixture(tmp_path, parameters):
    """A router alone, one fused weight of two, and a linear layer that PEFT was told to adapt as a parameter."""
    folder = adapter(
        mixture("mixtral"), tmp_path / "a", 1, target_modules=["v_proj"], target_parameters=list(parameters)
    )
    model = mixture("mixtral")
    with applied(model, read_adapter(folder)):
        assert difference(logits(model), logits(loaded(mixture("mixtral"), folder))) < 1e-5


def test_weights_come_back_after_an_error_and_experts_that_are_not_there(tmp_path):
    found = read_adapter(adapter(mixture("mixtral"), tmp_path / "a", 1, **options("mixtral")))
    model = mixture("mixtral")
    before = logits(model)
    with pytest.raises(ZeroDivisionError), applied(model, found):
        raise ZeroDivisionError
    down = "model.layers.0.mlp.experts.down_proj"
    ninth = replace(found, modules={**found.modules, f"{down}[9]": found.modules[f"{down}[0]"]})
    small = replace(found, modules={f"{down}[0]": LoraFactors(torch.ones(2, 5), torch.ones(7, 2), 1.0, EXPERT)})
    other = replace(found, modules={"model.layers.0.mlp.none[0]": small.modules[f"{down}[0]"]})
    for wrong, why in ((ninth, "no expert 9"), (small, r"update is \(7, 5\)"), (other, "not fused into such a weight")):
        with pytest.raises(InputError, match=why), applied(model, wrong):
            pass
        assert torch.equal(logits(model), before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with a tokenizer, two adapters of its experts, two of its routers, and rows."""
    root = tmp_path_factory.mktemp("mixtures")
    (root / "base").mkdir()
    save_tokenizer(root / "base", "llama")
    mixture("mixtral", vocab_size=80).save_pretrained(root / "base")
    for seed, (name, which) in enumerate(
        {"a": FUSED, "b": FUSED, "r": ["mlp.gate.weight"], "s": ["mlp.gate.weight"]}.items()
    ):
        adapter(mixture("mixtral", vocab_size=80), root / name, seed, **options("mixtral", *which))
    with (root / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("text", "label"), *((f"w{i} w{i + 1} w3", ("w4", "w7")[i % 2]) for i in range(20))]
        )
    (root / "texts.txt").write_text("".join(f"w{i} w3 w5 w6\n" for i in range(12)))
    return root


@pytest.mark.parametrize("name", ["a", "r"])
def test_eval_scores_the_model_that_baking_makes(capsys, folder, tmp_path, name):
    """The floor of a base into which the adapter was baked is the adapter's score on the base."""
    source = ["--task", "words", "--train-file", folder / "rows.csv", "--validation-file", folder / "rows.csv"]
    source += ["--text", "text", "--kind", "causal", "--device", "cpu", "--json"]
    assert call(capsys, "merge", folder / name, "--bake", folder / "base", "--out", tmp_path / "baked")[0] == 0
    found = {}
    for base in (folder / "base", tmp_path / "baked"):
        code, out, err = call(capsys, "eval", folder / name, "--base", base, *source)
        assert code == 0, err
        found[base.name] = json.loads(out)["adapters"][0]["tasks"]["words"]
    assert found["base"]["score"] == found["baked"]["floor"]
    assert name == "r" or found["base"]["score"] != found["base"]["floor"]  # a router moves no answer of these


@pytest.mark.parametrize(("one", "two", "why"), [("a", "b", "a fused expert"), ("r", "s", "MixtralTopKRouter")])
def test_what_compares_predictions_says_that_it_does_not_take_them(capsys, folder, tmp_path, one, two, why):
    texts = ["--text", f"{one}={folder / 'texts.txt'}", "--text", f"{two}={folder / 'texts.txt'}", "--device", "cpu"]
    pair = [folder / "base", folder / one, folder / two]
    for command in (["advise", *pair], ["merge", "auto", *pair, "--out", tmp_path / "m"]):
        code, _, err = call(capsys, *command, *texts)
        assert code == 3 and why in err and "linear layers only" in err and "plait eval scores it" in err, err
    assert not (tmp_path / "m").exists()


def test_advice_without_texts_names_no_command_that_would_be_refused(capsys, folder):
    code, out, _ = call(capsys, "advise", folder / "base", folder / "a", folder / "b")
    assert code == 0 and "cannot be measured here" in out and "--text" not in out
    assert "factors of fused experts" in out and "export --for vllm" not in out


def test_figures_of_adapters_are_of_experts_too(folder):
    """The whole update counts: an adapter of nothing but experts is neither 0 % off nor of 0 bytes."""
    a, b = (read_adapter(folder / n) for n in ("a", "b"))
    only = [replace(x, modules={m: f for m, f in x.modules.items() if f.kind == EXPERT}) for x in (a, b)]
    zero = replace(only[0], modules={m: replace(f, scaling=0.0) for m, f in only[0].modules.items()})
    assert all(t.error(1.0) == pytest.approx(1.0) for t in terms(zero, only).values())
    assert cosines([only[0], only[0]])[only[0].name, only[0].name] == pytest.approx(1.0)
    assert costs.factors_at(only, 2) == costs.adapter_bytes(only[0]) > 0


def test_training_goes_on_elsewhere(capsys, folder, tmp_path):
    source = ["--base", folder / "base", "--task", "words", "--train-file", folder / "rows.csv", "--text", "text"]
    code, _, err = call(
        capsys, "train", folder / "a", *source, "--kind", "causal", "--device", "cpu", "--out", tmp_path / "t"
    )
    assert code == 3 and "not trained" in err and "is_trainable=True" in err
