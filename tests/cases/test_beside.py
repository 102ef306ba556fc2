"""Tensors beside the factors: trained whole, PEFT's copies of the base, emptied, missing, foreign; trained tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cases.conftest import (
    IDS,
    changed_config,
    changed_tensors,
    far,
    folder_of,
    llama,
    loaded,
    logits,
    trained,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings.*",
    "ignore:.*tied.*",
    "ignore:.*embedding.*",
    "ignore:Adapter 'default'",
    "ignore:.*config file.*",
)
ROOT = "base_model.model."
EMBED, OUTPUT = "model.embed_tokens", "lm_head"


def saved(tied: bool, folder: str = "in/base") -> None:
    llama(tied=tied).save_pretrained(folder)


# --- trained whole ----------------------------------------------------------------------------------------------------

WHOLE = [
    (True, ["embed_tokens"], {}),
    (False, ["embed_tokens"], {}),
    (True, ["lm_head"], {}),
    (False, ["embed_tokens", "lm_head"], {}),
    (True, ["embed_tokens", "lm_head"], {}),
    (True, ["embed_tokens"], {"ensure_weight_tying": True}),
    (False, ["norm"], {}),
]


@pytest.mark.parametrize(("tied", "whole", "more"), WHOLE)
def test_a_merge_of_one_is_the_adapter_and_the_base_stays_the_base(tied, whole, more, plait, tmp_path):
    wanted = trained(tmp_path / "in/chat", llama(tied=tied), modules_to_save=whole, **more)
    zero = logits(llama(tied=tied))
    code, out, err = plait("merge in/chat --out out")
    assert code == 0 and "was trained whole: carried as it is (declared in modules_to_save)" in out, err
    model = loaded("out", llama(tied=tied))
    assert far(logits(model), wanted, zero) < 1e-5
    with model.disable_adapter():
        assert torch.equal(logits(model), zero)


@pytest.mark.parametrize("tied", [True, False])
def test_beside_a_plain_adapter_the_whole_weight_counts_once(tied, plait, tmp_path):
    trained(tmp_path / "in/chat", llama(tied=tied), modules_to_save=["embed_tokens"])
    trained(tmp_path / "in/plain", llama(tied=tied), seed=2)
    code, _, err = plait("merge in/chat in/plain --weights 1,0.5 --out out")
    assert code == 0, err
    chat = loaded("in/chat", llama(tied=tied))
    half = loaded("in/plain", llama(tied=tied))
    factors = {n: p for n, p in half.named_parameters() if "lora_B" in n}
    with torch.no_grad():  # W + s B A of chat, and half of plain's update in each of the same weights
        for name, B in factors.items():
            A = dict(half.named_parameters())[name.replace("lora_B", "lora_A")]
            weight = dict(chat.named_parameters())[name.replace("lora_B.default", "base_layer")]
            weight += 0.5 * 2.0 * B @ A
    zero = logits(llama(tied=tied))
    assert far(logits(loaded("out", llama(tied=tied))), logits(chat), zero) < 1e-5


REFUSED_WHOLE = [
    ("merge in/chat in/plain --weights 0.5,0.5 --out out", "it counts 0.5 times here"),
    ("merge in/chat --scale 0.7 --out out", "it counts 0.7 times here"),
    ("merge in/chat in/plain --method linear --out out", "it counts 0.5 times here"),
    ("merge in/chat in/plain --method ties --out out", "ties is no weighted sum"),
    ("merge in/chat --method svd --calibrate pico --out out", "svd is no weighted sum"),
    ("merge in/chat in/again --out out", "it counts 2 times here"),
    ("merge in/chat in/other --out out", "both trained 'model.embed_tokens.weight' whole and it differs"),
    ("merge in/chat in/low --out out", "'chat' trained 'model.embed_tokens.weight' whole and 'low' by factors"),
    ("merge auto in/chat in/plain --out out", "was trained whole"),
]


@pytest.fixture(scope="module")
def whole_ones(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    saved(False, str(root / "in/base"))
    wanted = trained(root / "in/chat", llama(tied=False), modules_to_save=["embed_tokens"])
    torch.save(wanted, root / "in/chat.pt")
    trained(root / "in/plain", llama(tied=False), seed=2)
    trained(root / "in/other", llama(tied=False), seed=3, modules_to_save=["embed_tokens"])
    trained(root / "in/low", llama(tied=False), seed=4, target_modules=["q_proj", "embed_tokens"])
    shutil.copytree(root / "in/chat", root / "in/again")
    return root


@pytest.mark.parametrize(("command", "why"), REFUSED_WHOLE)
def test_what_would_need_the_base_is_refused_with_the_way_out(command, why, plait, whole_ones, tmp_path):
    shutil.copytree(whole_ones / "in", tmp_path / "in")
    code, _, err = plait(command)
    assert (
        code == 3
        and why in err
        and "plait convert in/chat --base" in err.replace("in/other", "in/chat").replace("in/again", "in/chat")
    ), err
    assert not Path("out").exists()


def test_the_same_whole_weight_at_coefficients_that_sum_to_one(plait, whole_ones, tmp_path):
    shutil.copytree(whole_ones / "in", tmp_path / "in")
    code, _, err = plait("merge in/chat in/again --method linear --out out")
    assert code == 0, err
    zero = logits(llama(tied=False))
    assert far(logits(loaded("out", llama(tied=False))), torch.load("in/chat.pt"), zero) < 1e-5


def test_the_way_out_is_one(plait, whole_ones, tmp_path):
    """Converted at full rank, half of the whole weight's change is half of it, by any road."""
    shutil.copytree(whole_ones / "in", tmp_path / "in")
    assert plait("convert in/chat --base in/base --rank 32 --out plain_chat")[0] == 0
    code, _, err = plait("merge plain_chat --scale 0.5 --out half")
    assert code == 0, err
    model, whole = llama(tied=False), loaded("in/chat", llama(tied=False))
    state = dict(whole.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == f"{EMBED}.weight":
                weight += 0.5 * (load_file("in/chat/adapter_model.safetensors")[f"{ROOT}{name}"] - weight)
            elif name.endswith(("q_proj.weight", "v_proj.weight")):
                at = f"{ROOT}{name.removesuffix('.weight')}"
                weight += 0.5 * 2.0 * state[f"{at}.lora_B.default.weight"] @ state[f"{at}.lora_A.default.weight"]
    assert far(logits(loaded("half", llama(tied=False))), logits(model), logits(llama(tied=False))) < 1e-4


UNDECLARED = [
    (True, ["embed_tokens"], "embed_tokens"),
    (False, ["lm_head"], "lm_head"),
    (False, ["embed_tokens", "lm_head"], "embed_tokens, lm_head"),
]


@pytest.mark.parametrize(("tied", "whole", "named"), UNDECLARED)
def test_a_whole_weight_that_nothing_declares_is_refused_as_it_is_read(tied, whole, named, plait, tmp_path):
    """What PEFT saves of a resized vocabulary: loading it changes the base, also where the adapter is switched off."""
    trained(tmp_path / "in/chat", llama(tied=tied), modules_to_save=whole)
    trained(tmp_path / "in/plain", llama(tied=tied), seed=2)
    changed_config(tmp_path / "in/chat", modules_to_save=None)
    wanted, zero = logits(loaded("in/chat", llama(tied=tied))), logits(llama(tied=tied))
    for command in (
        "merge in/chat --out out",
        "merge in/chat in/plain --weights 0.5,0.5 --out out",
        "merge in/chat in/plain --method ties --out out",
        "merge auto in/chat in/plain --out out",
    ):
        code, _, err = plait(command)
        assert code == 3 and "modules_to_save does not name it" in err and "chat:" in err, (command, err)
        assert "plait convert in/chat --base" in err and f"modules_to_save: {named} in" in err, err
        assert not Path("out").exists()
    code, _, err = plait("convert in/chat --out out")
    assert code == 3 and "with the base's weights only (--base DIR)" in err
    _, out, _ = plait("inspect in/chat")
    assert "merge with adapters" not in out and "plait convert --base" in out
    saved(tied)
    assert plait("convert in/chat --base in/base --rank 32 --out low")[0] == 0
    assert far(logits(loaded("low", llama(tied=tied))), wanted, zero) < 1e-4
    if not tied:  # the other way out
        changed_config(tmp_path / "in/chat", modules_to_save=whole)
        assert plait("merge in/chat --out out")[0] == 0
        assert far(logits(loaded("out", llama(tied=False))), wanted, zero) < 1e-5


@pytest.mark.parametrize("whole", [["embed_tokens"], ["norm"]])
@pytest.mark.parametrize(
    "command", ["merge in/chat --bake", "merge in/chat in/plain --bake", "merge in/plain in/chat --bake"]
)
def test_baking_names_the_adapter_and_the_command_that_works(whole, command, plait, tmp_path):
    saved(False)
    wanted = trained(tmp_path / "in/chat", llama(tied=False), modules_to_save=whole)
    trained(tmp_path / "in/plain", llama(tied=False), seed=2)
    code, _, err = plait(f"{command} in/base --out out")
    assert code == 3 and "chat: " in err and "was trained whole, beside the LoRA factors" in err, err
    assert not Path("out").exists()
    if whole == ["norm"]:  # no low-rank update is a norm's
        assert "norm.weight" in err and "is no matrix" in err and "plait convert" not in err
        code, _, err = plait("merge in/chat --scale 0.5 --out out")
        assert code == 3 and "is no matrix" in err and "plait convert" not in err
    else:
        assert "plait convert in/chat --base in/base --rank R --out DIR" in err
        from transformers import AutoModelForCausalLM

        assert plait("convert in/chat --base in/base --rank 32 --out low")[0] == 0
        assert plait("merge low --bake in/base --out out")[0] == 0
        baked = AutoModelForCausalLM.from_pretrained("out").eval()
        assert far(logits(baked), wanted, logits(llama(tied=False))) < 1e-4


# --- PEFT's copies of base weights ------------------------------------------------------------------------------------

COPIES = [
    (True, ["q_proj", "lm_head"]),
    (True, ["q_proj", "embed_tokens"]),
    (False, ["q_proj", "lm_head", "embed_tokens"]),
]


@pytest.mark.parametrize(("tied", "targets"), COPIES)
def test_copies_are_compared_with_the_base_and_not_called_trained(tied, targets, plait, tmp_path):
    from transformers import AutoModelForCausalLM

    saved(tied)
    wanted = trained(tmp_path / "in/head", llama(tied=tied), target_modules=targets)
    assert any(".base_layer." in k for k in load_file("in/head/adapter_model.safetensors"))
    zero = logits(llama(tied=tied))
    assert "the base's own, not trained" in plait("inspect in/head")[1]
    for command in (
        "merge in/head --out m",
        "merge in/head --bake in/base --out b",
        "convert in/head --base in/base --out c",
    ):
        code, out, err = plait(command)
        assert code == 0 and ("it was not trained" in out or "as PEFT saves it: carried" in out), err
    assert not any(".base_layer." in k for k in load_file("c/adapter_model.safetensors"))
    for folder in ("m", "c"):
        assert far(logits(loaded(folder, llama(tied=tied))), wanted, zero) < 1e-5
    assert far(logits(AutoModelForCausalLM.from_pretrained("b").eval()), wanted, zero) < 1e-5


def test_a_copy_that_is_not_the_base_s_is_told(plait, tmp_path):
    saved(True)
    trained(tmp_path / "in/head", llama(), target_modules=["q_proj", "lm_head"])
    key = f"{ROOT}lm_head.base_layer.weight"
    changed_tensors(tmp_path / "in/head", lambda t: t | {key: t[key] * 1.5})
    for command in ("merge in/head --bake in/base --out b", "convert in/head --base in/base --out c"):
        code, _, err = plait(command)
        assert code == 3 and "differs from the base's 'model.embed_tokens.weight' by 0.5 of it" in err
    changed_tensors(tmp_path / "in/head", lambda t: t | {key: torch.cat([t[key], t[key][:2]])})
    code, _, err = plait("merge in/head --bake in/base --out b")
    assert code == 3 and "was the vocabulary resized" in err and not Path("b").exists()


def test_two_adapters_of_different_embeddings(plait, tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        trained(tmp_path / f"in/{name}", llama(), seed=seed, target_modules=["q_proj", "lm_head"])
    assert plait("merge in/one in/two --out m")[0] == 0
    key = f"{ROOT}lm_head.base_layer.weight"
    changed_tensors(tmp_path / "in/two", lambda t: t | {key: t[key] + 1})
    code, _, err = plait("merge in/one in/two --out m2")
    assert code == 3 and "they were not trained on one base" in err


# --- empty, missing, foreign ------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"
WRONG = {
    "an empty whole weight": ({"lm_head.weight": torch.zeros(0)}, {"modules_to_save": ["lm_head"]}, "is empty, of shape (0,)"),
    "an empty factor": ({f"{Q}.lora_A.weight": torch.zeros(4, 0)}, {}, f"{Q}.lora_A.weight' is empty"),
    "an empty copy": ({"lm_head.base_layer.weight": torch.zeros(0)}, {}, "stage3_gather_16bit_weights_on_model_save"),
    "a name without a tensor": ({}, {"modules_to_save": ["embed_tokens"]}, "names 'embed_tokens', and the file holds no tensor of it"),
    "one of two names": ({"lm_head.weight": torch.ones(4, 4)}, {"modules_to_save": ["lm_head", "norm"]}, "modules_to_save names 'norm'"),
    "DoRA's magnitudes": ({f"{Q}.lora_magnitude_vector": torch.ones(32)}, {}, "a magnitude of DoRA, and use_dora is not set"),
    "a bias of B": ({f"{Q}.lora_B.bias": torch.ones(32)}, {}, "a bias of B, and lora_bias is not set"),
    "a bias of the layer": ({f"{Q}.bias": torch.ones(32)}, {}, f"does not speak of tensor '{Q}.bias'"),
    "VeRA's": ({f"{Q}.vera_lambda_b": torch.ones(32)}, {}, "VeRA's, and peft_type is LORA"),
    "a third factor": ({f"{Q}.lora_C.weight": torch.ones(4, 4)}, {}, "no factor of LoRA"),
    "trained tokens": ({f"{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(2, 4)}, {}, "trainable_token_indices names none"),
    "a norm": ({"model.norm.weight": torch.ones(32)}, {}, "modules_to_save names what was trained whole"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("command", ["merge in/a --out out", "convert in/a --out out", "inspect in/a"])
def test_nothing_beside_the_factors_is_passed_over(what, command, plait, tmp_path):
    tensors, config, message = WRONG[what]
    folder_of(tmp_path / "in/a", {Q: (32, 32)}, **config)
    changed_tensors(tmp_path / "in/a", lambda t: t | {ROOT + k: v for k, v in tensors.items()})
    code, out, err = plait(command)
    said = out if command.startswith("inspect") else err
    assert code == (0 if command.startswith("inspect") else 3)
    if command.startswith("convert") and what in ("DoRA's magnitudes", "trained tokens"):
        assert "use_dora is not set, and the file holds magnitudes" in said or "names none, and the file has" in said
    elif command.startswith("convert") and what == "a bias of B":
        assert "lora_bias: its biases" in said
    else:
        assert message in said
    assert not Path("out").exists()


def test_the_shared_case_of_emptied_weights(case, plait):
    case("03_zero3_empty_modules_to_save")
    for command in (
        "merge in/run1 in/run2 --out m",
        "merge in/clean in/run2 --out m",
        "convert in/run1 --base in --out c",
    ):
        code, _, err = plait(command)
        assert code == 3 and ("is empty, of shape (0,)" in err or "holds no tensor of it" in err), err


# --- trained tokens ---------------------------------------------------------------------------------------------------

TOKENS = [
    (True, [5, 6, 9]),
    (True, {"embed_tokens": [5, 6, 9]}),
    (False, [5, 9]),
    (False, {"lm_head": [4, 5]}),
    (False, {"embed_tokens": [5, 6], "lm_head": [4, 5, 6]}),
]


@pytest.mark.parametrize(("tied", "indices"), TOKENS)
def test_trained_tokens_become_what_peft_loads(tied, indices, plait, tmp_path):
    from transformers import AutoModelForCausalLM

    saved(tied)
    wanted = trained(tmp_path / "in/tokens", llama(tied=tied), trainable_token_indices=indices)
    assert {5} & set(IDS[0].tolist())  # the rows are asked
    zero = logits(llama(tied=tied))
    code, out, err = plait("convert in/tokens --base in/base --rank 32 --out plain")
    assert code == 0 and "exact" in out, err
    assert far(logits(loaded("plain", llama(tied=tied))), wanted, zero) < 1e-5
    assert plait("merge plain --bake in/base --out baked")[0] == 0
    assert far(logits(AutoModelForCausalLM.from_pretrained("baked").eval()), wanted, zero) < 1e-5


def test_trained_tokens_of_an_output_layer_merge_with_its_factors(plait, tmp_path):
    saved(False)
    trained(tmp_path / "in/tokens", llama(tied=False), trainable_token_indices={"lm_head": [4, 5]})
    trained(tmp_path / "in/head", llama(tied=False), seed=2, target_modules=["q_proj", "lm_head"])
    for name in ("tokens", "head"):
        assert plait(f"convert in/{name} --base in/base --out p_{name}")[0] == 0
    code, _, err = plait("merge tokens=p_tokens head=p_head --out out")
    assert code == 0, err
    both = [loaded(f"p_{n}", llama(tied=False)).merge_and_unload() for n in ("tokens", "head")]
    summed = llama(tied=False)
    with torch.no_grad():
        for name, weight in summed.named_parameters():
            first = weight.clone()
            weight += sum(m.get_parameter(name) - first for m in both)
    assert far(logits(loaded("out", llama(tied=False))), logits(summed), logits(llama(tied=False))) < 1e-5


@pytest.mark.parametrize("name", ["tokens", "tokens_dict", "tokens_both", "tied_lora", "tied_mts"])
def test_the_shared_case_of_trained_tokens(name, case, plait):
    from transformers import AutoModelForCausalLM

    case("15_trainable_tokens_lm_head")
    base = "in/untied" if name == "tokens_both" else "in/base"
    code, _, err = plait(f"convert in/{name} --base {base} --rank 32 --out plain")
    assert code == 0, err
    ids = torch.arange(55, 64)[None]
    with torch.no_grad():
        zero = AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits
        found = loaded("plain", AutoModelForCausalLM.from_pretrained(base))(ids).logits
    assert far(found, torch.load("in/logits.pt")[name], zero) < 1e-5


def test_the_shared_case_of_whole_weights(case, plait):
    from transformers import AutoModelForCausalLM

    case("01_tied_modules_to_save")
    assert plait("merge in/chat --out m")[0] == 0 and plait("merge in/chat in/plain --out m2")[0] == 0
    assert plait("merge in/chat in/plain --weights 0.5,0.5 --out m3")[0] == 3
    base = AutoModelForCausalLM.from_pretrained("in/base").eval()
    zero = logits(base)
    model = loaded("m", base)
    assert far(logits(model), torch.load("in/logits.pt")["chat"], zero) < 1e-5
    with model.disable_adapter():
        assert torch.equal(logits(model), zero)
