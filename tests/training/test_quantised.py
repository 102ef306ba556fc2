"""Training on a base in 4 bits, as bitsandbytes packs it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from plait.disk.store import identity
from plait.errors import EnvironmentFault, InputError
from plait.model.base import BaseModel, load_task_model, load_tokenizer
from plait.model.stacked import common_shapes
from plait.statistics import collect_statistics
from plait.tasks import batches, encode
from plait.training import Member, TrainingSettings, train_adapter, train_fleet
from tests.tiny import TARGETS, make_adapter, make_examples, make_task, save_model, save_tokenizer

SETTINGS = TrainingSettings(steps=60, lr=1e-2, batch_size=8, max_length=24, constraint="penalised")


class Packed(nn.Module):
    """A linear layer whose weight says nothing of its shape."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.out_features, self.in_features = n_out, n_in
        self.weight = nn.Parameter(torch.zeros(n_out * n_in // 2, 1, dtype=torch.uint8), requires_grad=False)


def test_a_packed_layer_says_how_wide_it_is(tiny_base):
    adapter = make_adapter(tiny_base("llama"), make_task(), "llama")
    backbone = nn.Module()
    for name, f in adapter.modules.items():
        *path, last = name.split(".")
        place = backbone
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, Packed(*f.shape))
    assert {n: s[1:] for n, s in common_shapes([adapter], backbone).items()} == {
        n: f.shape for n, f in adapter.modules.items()
    }
    place.add_module(last, Packed(8, 6))
    with pytest.raises(InputError, match=r"the base's module \(8, 6\)"):
        common_shapes([adapter], backbone)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import transformers

    save_model(tmp_path / "base", "llama")

    def absent(*_, **__):
        raise ImportError("bitsandbytes is not here\nmore")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", absent)
    task = replace(make_task("topic"), kind="causal")
    with pytest.raises(EnvironmentFault, match="needs a package: bitsandbytes is not here"):
        load_task_model(BaseModel(str(tmp_path / "base"), device="cpu"), task, seed=0)


@pytest.mark.filterwarnings("ignore")
def test_a_base_in_four_bits_is_trained_under_the_penalty(tmp_path):
    pytest.importorskip("bitsandbytes")
    import transformers as hf

    plain, folder = BaseModel(str(tmp_path / "plain"), device="cpu"), tmp_path / "nf4"
    words = save_tokenizer(tmp_path / "plain", "llama")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # blocks of 64
    ids = {"vocab_size": words, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.1}
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **ids)).save_pretrained(plain.name)
    four = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    hf.AutoModelForCausalLM.from_pretrained(plain.name, quantization_config=four, device_map="cpu").save_pretrained(
        folder
    )
    save_tokenizer(folder, "llama")
    base, found = BaseModel(str(folder), device="cpu"), {}
    tokenizer = load_tokenizer(base)
    for i, name in enumerate(("topic", "b", "c")):
        task = make_task(name)
        rows = encode(tokenizer, task, make_examples(task, 40, seed=10 + i), 24)
        found[name] = collect_statistics(
            load_task_model(base, task, seed=0), batches(tokenizer, rows, 8), TARGETS["llama"]
        )
    assert found["topic"].provenance["quantisation"] == "bitsandbytes-4bit"
    task = make_task("topic")
    start, rows = make_adapter(plain, task, "llama"), make_examples(task, 64, seed=1)
    shifts = {}
    for kind in ("free", "penalised"):
        settings = replace(SETTINGS, constraint=kind)
        out = tmp_path / kind
        trained = train_adapter(
            start,
            task,
            rows,
            base,
            settings,
            seed=0,
            out=out,
            identity=identity("adapter", {}, {}, 0),
            statistics=found,
        )
        shifts[kind] = shift_of(trained, found["b"])
    assert 0 < shifts["penalised"] < 0.7 * shifts["free"]
    member = Member(start, task, rows, SETTINGS, 0, tmp_path / "fleet", identity("adapter", {}, {}, 0), found)
    train_fleet([member], base)
    assert (tmp_path / "fleet" / "adapter_model.safetensors").is_file()


def shift_of(adapter, statistics):
    """Mean relative shift of a task's outputs, by its moments."""
    shifts = []
    for name, f in adapter.modules.items():
        D = f.scaling * f.B.double() @ f.A.double()
        m = statistics.moments_for(statistics.relative(name)).normalised(torch.float64)
        shifts.append(float(torch.trace(D @ m @ D.T)))
    return sum(shifts) / len(shifts)
