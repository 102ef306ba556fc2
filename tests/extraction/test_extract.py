"""LoRAs taken out of full fine-tunes: what was put in comes out, what is left out is said."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.adapters.peft_format import read_adapter
from plait.errors import InputError, UsageError
from plait.extraction.extract import Extraction, extract
from tests.mixtures import IDS, difference, loaded, logits, mixture
from tests.tiny import save_model


def changed(model: Any, rank: int | None = 8, *, skip: tuple[str, ...] = (), size: float = 0.05) -> Any:
    """Every matrix of the layers moved by a random update of this rank (None: full rank)."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not ("layer" in name or ".h." in name) or p.ndim < 2 or name.endswith(skip or ("-",)):
                continue
            for matrix in p if p.ndim == 3 else [p]:
                r = min(rank or min(matrix.shape), *matrix.shape)
                left = torch.randn(matrix.shape[0], r, generator=generator)
                matrix += size * left @ torch.randn(r, matrix.shape[1], generator=generator)
    return model


def llama(**kept: Any) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=0, eos_token_id=2, **kept,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    import transformers as hf

    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval()


MODELS = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "mixtral": lambda: mixture("mixtral"),
    "qwen3_moe": lambda: mixture("qwen3_moe"),
    "gpt_oss": lambda: mixture("gpt_oss"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_known_update_comes_back(tmp_path, name):
    MODELS[name]().save_pretrained(tmp_path / "base")
    tuned = changed(MODELS[name](), skip=("bias",))
    tuned.save_pretrained(tmp_path / "tuned")
    done = extract(Extraction(tmp_path / "tuned", tmp_path / "base", rank=8), tmp_path / "lora")
    assert done.record.energy_kept > 1 - 1e-10 and done.record.verification_error < 1e-6 and done.record.dropped == {}
    found = logits(loaded(MODELS[name](), tmp_path / "lora"))
    assert difference(found, logits(tuned)) < 1e-5
    assert difference(found, logits(MODELS[name]())) > 0.01


def test_an_energy_gives_each_module_the_smallest_rank_that_keeps_it(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    changed(llama(), None).save_pretrained(tmp_path / "tuned")
    done = extract(Extraction(tmp_path / "tuned", tmp_path / "base", energy=0.8), tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["rank_pattern"] and len({r.rank for r in done.record.by_module.values()}) > 1
    base, tuned = dict(llama().named_parameters()), dict(changed(llama(), None).named_parameters())
    for module, row in done.record.by_module.items():
        D = (tuned[f"{module}.weight"] - base[f"{module}.weight"]).detach().double()
        shares = torch.linalg.svdvals(D).square().cumsum(0) / D.square().sum()
        assert shares[row.rank - 1] >= 0.8 - 1e-9 and (row.rank == 1 or shares[row.rank - 2] < 0.8)
        assert row.energy_kept == pytest.approx(float(shares[row.rank - 1]), abs=1e-6)
    loaded(llama(), tmp_path / "lora")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    llama().to(dtype).save_pretrained(tmp_path / "base")
    changed(llama().to(dtype).float()).to(dtype).save_pretrained(tmp_path / "tuned", max_shard_size="10KB")
    done = extract(Extraction(tmp_path / "tuned", tmp_path / "base", rank=32), tmp_path / "lora")
    assert done.record.energy_kept > 1 - 1e-9  # full rank: rounding of the checkpoint is part of the difference
    exact = extract(Extraction(tmp_path / "tuned", tmp_path / "base", rank=8), tmp_path / "eight")
    assert 0.9 < exact.record.energy_kept < 1 - 1e-9


@pytest.mark.parametrize("rank", [2, 5])
def test_statistics_choose_the_metric(tmp_path, rank):
    """Twin: on the very tokens that the statistics saw, the outputs of the layers stay nearer to the fine-tuned ones'."""
    from plait.statistics import collect_statistics
    from plait.statistics.files import write_statistics

    llama().save_pretrained(tmp_path / "base")
    changed(llama(), None).save_pretrained(tmp_path / "tuned")
    found = collect_statistics(llama(), [{"input_ids": IDS}], "all-linear", provenance={"task": "t"})
    write_statistics(tmp_path / "t.stats.safetensors", found)
    ask = {"finetuned": tmp_path / "tuned", "base": tmp_path / "base", "rank": rank}
    plain = extract(Extraction(**ask), tmp_path / "plain")
    weighed = extract(Extraction(**ask, statistics=tmp_path / "t.stats.safetensors"), tmp_path / "weighed")
    assert (
        weighed.record.energy_kept < plain.record.energy_kept
        and weighed.record.metric_kept > weighed.record.energy_kept
    )
    base, tuned = dict(llama().named_parameters()), dict(changed(llama(), None).named_parameters())
    for name, factors in read_adapter(tmp_path / "weighed").modules.items():
        M = found.moments_for(name).dense().double()
        D = (tuned[f"{name}.weight"] - base[f"{name}.weight"]).detach().double()

        def loss(delta, D=D, M=M):
            return float(((D - delta.double()) @ M * (D - delta.double())).sum() / ((D @ M) * D).sum())

        other = read_adapter(tmp_path / "plain").modules[name]
        assert loss(factors.delta()) <= loss(other.delta()) * (1 + 1e-5)
        assert weighed.record.by_module[name].metric_kept == pytest.approx(1 - loss(factors.delta()), abs=1e-5)


def test_statistics_of_another_base_are_refused(tmp_path):
    from plait.model.base import BaseModel
    from plait.model.identity import base_facts
    from plait.statistics import collect_statistics
    from plait.statistics.files import write_statistics

    base, tuned = tmp_path / "base", tmp_path / "tuned"
    llama().save_pretrained(base)
    changed(llama(), None).save_pretrained(tuned)
    for name, model in (("own", base), ("other", tuned)):
        facts = base_facts(BaseModel(str(model), device="cpu"))
        found = collect_statistics(llama(), [{"input_ids": IDS}], "all-linear", provenance={"task": "t", **facts})
        write_statistics(tmp_path / f"{name}.stats.safetensors", found)
    ask = {"finetuned": tuned, "base": base, "rank": 2, "drop": True}
    extract(Extraction(**ask, statistics=tmp_path / "own.stats.safetensors"), tmp_path / "out")
    with pytest.raises(InputError, match=r"the statistics were collected on .*, whose files are not those of"):
        extract(Extraction(**ask, statistics=tmp_path / "other.stats.safetensors"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_statistics_that_lack_a_module_are_refused(tmp_path):
    from plait.statistics import collect_statistics
    from plait.statistics.files import write_statistics

    llama().save_pretrained(tmp_path / "base")
    changed(llama(), None).save_pretrained(tmp_path / "tuned")
    found = collect_statistics(llama(), [{"input_ids": IDS}], ["q_proj"], provenance={"task": "t"})
    write_statistics(tmp_path / "t.stats.safetensors", found)
    ask = Extraction(tmp_path / "tuned", tmp_path / "base", rank=2, statistics=tmp_path / "t.stats.safetensors")
    with pytest.raises(InputError, match="no moments"):
        extract(ask, tmp_path / "lora")


@pytest.mark.parametrize("target", ["q_proj", "layers.1.mlp.up_proj", "k_proj.weight", "lm_head.weight", "lm_head"])
def test_a_target_is_a_module_or_its_weight_by_its_whole_name_or_the_end_of_it(tmp_path, target):
    llama().save_pretrained(tmp_path / "base")
    move("lm_head.weight")(changed(llama())).save_pretrained(tmp_path / "tuned")
    ask = Extraction(tmp_path / "tuned", tmp_path / "base", rank=8, drop=True, target_modules=(target,))
    found = set(extract(ask, tmp_path / "lora").record.by_module)
    everything = [*dict(llama().named_modules())]
    assert found == {n for n in everything if f".{n}".endswith(f".{target.removesuffix('.weight')}")}


def test_half_a_word_is_no_target(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    changed(llama()).save_pretrained(tmp_path / "tuned")
    with pytest.raises(UsageError, match="'proj' matches nothing"):
        extract(Extraction(tmp_path / "tuned", tmp_path / "base", rank=8, target_modules=("proj",)), tmp_path / "lora")


def test_the_command_says_what_it_kept(tmp_path, capsys):
    from plait.cli import main

    llama().save_pretrained(tmp_path / "base")
    move("model.norm.weight")(changed(llama(), None)).save_pretrained(tmp_path / "tuned")
    given = ["extract", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "lora")]
    with pytest.raises(SystemExit) as stopped:
        main([*given, "--rank", "4"])
    assert stopped.value.code == 3 and "model.norm.weight" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([*given, "--energy", "0.5", "--drop"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "of the squared change" in said and "left out: 1 tensor" in said
    with pytest.raises(SystemExit) as stopped:
        main([*given, "--rank", "4", "--energy", "0.5"])
    assert stopped.value.code == 2


def classifier(folder: Path, base: Path) -> Any:
    import transformers as hf

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hf.AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=3, id2label={0: "a", 1: "b", 2: "c"}
        )
    model = changed(model.eval())
    model.save_pretrained(folder)
    return model


def test_a_classifier_keeps_its_head_whole(tmp_path):
    import peft
    import transformers as hf

    base = save_model(tmp_path / "base", "bert")
    tuned = classifier(tmp_path / "tuned", base)
    done = extract(Extraction(tmp_path / "tuned", base, rank=8), tmp_path / "lora")
    assert done.record.heads == ("lora",) and done.record.task_type == "SEQ_CLS"
    again = read_adapter(tmp_path / "lora")
    assert again.classes == {"lora": ["a", "b", "c"]}
    fresh = hf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    found = peft.PeftModel.from_pretrained(fresh, tmp_path / "lora").eval()
    with torch.no_grad():
        assert difference(found(IDS).logits, tuned(IDS).logits) < 1e-5


def move(name: str) -> Any:
    def change(model: Any) -> Any:
        with torch.no_grad():
            dict(model.named_parameters())[name].add_(0.1)
        return model

    return change


OUTSIDE = {
    "a norm": "model.norm.weight",
    "an embedding": "model.embed_tokens.weight",
    "the output layer": "lm_head.weight",
    "a norm in a layer": "model.layers.1.input_layernorm.weight",
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_changes_outside_the_lora_are_refused_or_said(tmp_path, what):
    llama().save_pretrained(tmp_path / "base")
    move(OUTSIDE[what])(changed(llama())).save_pretrained(tmp_path / "tuned")
    ask = Extraction(tmp_path / "tuned", tmp_path / "base", rank=8)
    with pytest.raises(InputError, match=OUTSIDE[what].replace(".", r"\.")):
        extract(ask, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    done = extract(Extraction(tmp_path / "tuned", tmp_path / "base", rank=8, drop=True), tmp_path / "lora")
    assert list(done.record.dropped) == [OUTSIDE[what]] and done.record.dropped[OUTSIDE[what]] > 0


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_covered_where_they_are_asked_for(tmp_path, tied):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tuned = llama(tie_word_embeddings=tied)
    with torch.no_grad():
        tuned.model.embed_tokens.weight += 0.1 * torch.randn(64, 2) @ torch.randn(2, 32)
    tuned.save_pretrained(tmp_path / "tuned")
    ask = Extraction(tmp_path / "tuned", tmp_path / "base", rank=2, target_modules=("embed_tokens", "q_proj"))
    done = extract(ask, tmp_path / "lora")
    assert done.record.modules == 1 and done.record.unchanged == 2
    assert ("lm_head" in read_adapter(tmp_path / "lora").modules) is tied
    from plait.merging import plan_merge
    from plait.merging.bake.baking import bake

    bake(
        plan_merge([read_adapter(tmp_path / "lora")], "task_arithmetic", scale=1.0),
        tmp_path / "base",
        tmp_path / "baked",
    )
    import transformers as hf

    assert difference(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "baked")), logits(tuned)) < 1e-5


def resized(model: Any) -> Any:
    model.resize_token_embeddings(70)
    return model


REFUSED = {
    "a resized vocabulary": (lambda m: resized(changed(m)), {}, InputError, "resizes"),
    "nothing changed": (lambda m: m, {}, InputError, "equals the base"),
    "no rank": (changed, {"rank": None}, UsageError, "either"),
    "both": (changed, {"energy": 0.5}, UsageError, "either"),
    "rank 0": (changed, {"rank": 0}, UsageError, "at least 1"),
    "an energy above 1": (changed, {"rank": None, "energy": 1.5}, UsageError, r"\(0, 1\]"),
    "a target that is none": (changed, {"target_modules": ("quark",)}, UsageError, "quark"),
    "NaN": (lambda m: poisoned(changed(m)), {}, InputError, "NaN"),
}


def poisoned(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(tmp_path, what):
    make, options, kind, message = REFUSED[what]
    llama().save_pretrained(tmp_path / "base")
    make(llama()).save_pretrained(tmp_path / "tuned")
    with pytest.raises(kind) as raised:
        extract(Extraction(tmp_path / "tuned", tmp_path / "base", **{"rank": 4, **options}), tmp_path / "lora")
    import re

    assert re.search(message, str(raised.value) + str(raised.value.hint))
    assert not (tmp_path / "lora").exists()


def test_a_second_time_is_kept_and_another_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    changed(llama()).save_pretrained(tmp_path / "tuned")
    ask = Extraction(tmp_path / "tuned", tmp_path / "base", rank=4)
    extract(ask, tmp_path / "lora")
    assert extract(ask, tmp_path / "lora").reused
    with pytest.raises(UsageError):
        extract(Extraction(tmp_path / "tuned", tmp_path / "base", rank=5), tmp_path / "lora")


@pytest.mark.parametrize("which", ["finetuned", "base"])
def test_a_model_that_is_not_there(tmp_path, which):
    llama().save_pretrained(tmp_path / "there")
    places = {"finetuned": tmp_path / "there", "base": tmp_path / "there", which: tmp_path / "gone"}
    with pytest.raises(InputError, match="no such folder") as raised:
        extract(Extraction(**places, rank=2), tmp_path / "out")
    assert raised.value.where == str(tmp_path / "gone")
