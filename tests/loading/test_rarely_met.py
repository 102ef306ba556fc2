"""What accounts say where it is seldom met: patterns that take forever, names of a backbone alone, headers of no use, nothing at all."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plait.adapters.header import ITEMSIZES, TORCH_NAMES
from plait.errors import InputError
from plait.loading import accounts
from plait.loading.settings import matches
from tests.loading.planted import add, causal, change, classifier, configure, save_adapter
from tests.loading.test_servers import PAIR, gguf

LLM = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
SEQ_CLS = {"task_type": "SEQ_CLS", "target_modules": ["query"]}


def faults(path, loader):
    (account,) = accounts(path, [loader])
    return account.faults


def test_a_pattern_is_not_tried_where_its_ways_are_too_many():
    """Four repeats without an end on 101 characters: more ways than a second's worth."""
    pattern = ".*.*.*.*x"
    assert matches(pattern, "a" * 101) is None
    assert matches(pattern, "a" * 20) is False and matches(pattern, "a" * 20 + "x") is True
    assert matches(".*x", "a" * 500) is False  # one repeat is one way a place


@pytest.mark.parametrize(
    ("prefix", "heads"), [("bert", True), ("bert", False), ("encoder", True), (7, True), (None, True)]
)
def test_a_merge_whose_names_are_the_backbones_alone_takes_no_effect_over_heads(tmp_path, prefix, heads):
    folder = save_adapter(tmp_path / "merged", classifier().bert, target_modules=["query"])
    (folder / "plait.json").write_text(json.dumps({"result": {"backbone_prefix": prefix} if prefix else {}}))
    if heads:
        (folder / "heads").mkdir()
        save_file({"classifier.weight": torch.zeros(3, 16)}, folder / "heads/topic.safetensors")
    named = [f for f in faults(folder, "peft") if "a name of the backbone alone" in f.what]
    assert [f.tensor for f in named] == (
        ["encoder.layer.0.attention.self.query"] if (prefix, heads) == ("bert", True) else []
    )
    assert all("'bert'" in f.what and not f.raises for f in named)


def test_vllm_takes_a_head_that_nobody_declares_for_half_of_the_factors(tmp_path):
    folder = save_adapter(tmp_path / "one", classifier(), **SEQ_CLS)
    assert not any("half of the factors" in f.what for f in faults(folder, "vllm"))
    change(folder, configure(modules_to_save=[], task_type=None))
    found = {f.what for f in faults(folder, "vllm")}
    assert "is taken for half of the factors of 'classifier': modules_to_save does not name it" in found


def test_a_tensor_of_no_module_is_no_head_to_vllm(tmp_path):
    folder = change(save_adapter(tmp_path / "one", causal(), **LLM), add("weight", 3, 16))
    assert any(f.tensor == "weight" and "is a name that vLLM does not take" in f.what for f in faults(folder, "vllm"))


@pytest.mark.parametrize(
    ("key", "value", "stops"),
    [
        ("general.type", "model", True),
        ("adapter.type", "x", True),
        ("general.architecture", None, True),
        ("adapter.lora.alpha", None, False),
    ],
)
def test_llama_cpp_stops_at_what_is_no_adapter_and_goes_on_without_an_alpha(tmp_path, key, value, stops):
    (fault,) = faults(gguf(tmp_path / "a.gguf", PAIR, {key: value}), "llama.cpp")
    assert fault.tensor == key and fault.raises == stops


@pytest.mark.parametrize(
    "entry", [{"dtype": "F32", "shape": [2]}, {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, {}, 3]
)
def test_an_entry_that_does_not_say_where_its_tensor_lies(tmp_path, entry):
    text = json.dumps({"lora_up.weight": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(InputError, match=r"'lora_up\.weight' has no dtype, shape and offsets"):
        accounts(path)


@pytest.mark.parametrize(
    ("spans", "more", "what"),
    [
        ([(0, 8), (4, 12)], 0, "overlap at byte 4"),
        ([(0, 8), (12, 20)], 0, "leave bytes to none at byte 8"),
        ([(4, 12), (12, 20)], 0, "leave bytes to none at byte 0"),
        ([(0, 8), (8, 16)], 3, "end at byte 16, and 19 follow"),
    ],
)
def test_a_file_that_safetensors_itself_refuses_is_no_sound_one(tmp_path, spans, more, what):
    names = ("x.lora_down.weight", "x.lora_up.weight")
    entries = {
        n: {"dtype": "F32", "shape": [1, 2], "data_offsets": list(span)} for n, span in zip(names, spans, strict=True)
    }
    text = json.dumps(entries).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(max(stop for _, stop in spans) + more))
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")
    with pytest.raises(InputError, match=what):
        accounts(path)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="no such folder or file") as refused:
        accounts(tmp_path / "none")
    assert refused.value.where == str(tmp_path / "none")


def test_numbers_take_the_bytes_that_torch_gives_them():
    assert {code: getattr(torch, name).itemsize for code, name in TORCH_NAMES.items()} == {
        code: size for code, size in ITEMSIZES.items() if code in TORCH_NAMES
    }
    assert len(TORCH_NAMES) > 10
