"""A base is loaded whole or not at all, and its fingerprint covers what is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plait.errors import InputError
from plait.model.base import BaseModel, load_task_model, load_tokenizer
from plait.model.identity import base_facts, base_fingerprint, earlier_fingerprint
from plait.model.records import same_weights
from plait.tasks import Source, Task

LABELLED = Task("t", "classification", Source("none"), ("text",), labels=("a", "b"))
OF_KIND = {
    "classification": LABELLED,
    "regression": Task("t", "regression", Source("none"), ("text",)),
    "causal": Task("t", "causal", Source("none"), ("text",)),
    "seq2seq": Task("t", "seq2seq", Source("none"), ("text",)),
}
SINGLE = "model.safetensors"


@pytest.fixture
def copy(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> Callable[[str], BaseModel]:
    def make(architecture: str) -> BaseModel:
        base = tiny_base(architecture)
        folder = tmp_path / architecture
        shutil.copytree(base.name, folder)
        return replace(base, name=str(folder))

    return make


def folder_of(base: BaseModel) -> Path:
    return Path(base.name)


def change(base: BaseModel, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder_of(base) / SINGLE
    save_file(edit({k: v.clone() for k, v in load_file(path).items()}), path, metadata={"format": "pt"})


def configure(base: BaseModel, **fields: Any) -> None:
    path = folder_of(base) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shard(base: BaseModel) -> dict[str, str]:
    """The weights in two shards and an index; tensor -> shard."""
    folder = folder_of(base)
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    files = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / SINGLE).unlink()
    (folder / f"{SINGLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def refused(base: BaseModel, *words: str, kind: str = "classification") -> str:
    with pytest.raises(InputError) as caught:
        load_task_model(base, OF_KIND[kind], seed=0)
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert all(w in text for w in words), text
    assert "\n" not in text
    return text


# --- missing --------------------------------------------------------------------------------------------------------------


def test_missing_tensors_of_the_backbone_are_named(copy):
    base = copy("bert")
    change(base, lambda t: {k: v for k, v in t.items() if "embeddings" not in k and "layer.0." not in k})
    refused(base, "tensors are missing", "embeddings.LayerNorm.bias", "download it again, whole")


@pytest.mark.parametrize(
    ("architecture", "kind", "name"),
    [
        ("roberta", "regression", "encoder.layer.1.output.dense.bias"),
        ("llama", "causal", "model.norm.weight"),
        ("llama", "classification", "model.layers.0.mlp.up_proj.weight"),
        ("t5", "seq2seq", "decoder.block.1.layer.0.SelfAttention.k.weight"),
        ("gpt2", "causal", "transformer.h.0.ln_1.bias"),
    ],
)
def test_one_missing_tensor_of_any_architecture(copy, architecture, kind, name):
    base = copy(architecture)
    change(base, lambda t: {k: v for k, v in t.items() if k != name})
    refused(base, "1 of", name, kind=kind)


def test_a_missing_output_layer_of_a_language_model_is_refused_and_of_a_classifier_is_not(copy):
    base = copy("llama")
    change(base, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    refused(base, "lm_head.weight", "only its output layers", kind="causal")
    assert load_task_model(base, LABELLED, seed=0).score.weight.shape == (2, 32)


def test_tied_weights_may_be_absent(copy):
    for architecture, kind in (("gpt2", "causal"), ("t5", "seq2seq")):
        base = copy(architecture)
        model = load_task_model(base, OF_KIND[kind], seed=0)
        tensors = load_file(folder_of(base) / SINGLE)
        assert "lm_head.weight" not in tensors
        assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_a_new_pooler_is_drawn_alike_for_every_seed_and_said(copy, capfd):
    base = copy("bert")
    change(base, lambda t: {k: v for k, v in t.items() if not k.startswith("pooler")})
    torch.manual_seed(1)
    one = load_task_model(base, LABELLED, seed=0)
    torch.manual_seed(2)
    two = load_task_model(base, LABELLED, seed=5)
    assert torch.equal(one.bert.pooler.dense.weight, two.bert.pooler.dense.weight)
    assert float(one.bert.pooler.dense.weight.detach().std()) > 0
    assert not torch.equal(one.classifier.weight, two.classifier.weight)
    assert capfd.readouterr().err.count("no pooler in it") == 1


def test_a_base_saved_from_a_wrapped_model_is_told_so(copy):
    for prefix in ("module.", "_orig_mod."):
        base = copy("bert")
        change(base, lambda t, p=prefix: {p + k: v for k, v in t.items()})
        refused(base, "tensors are missing", "saved from a wrapped model", prefix)
        shutil.rmtree(folder_of(base))


def test_weights_of_another_model_are_refused(copy, tiny_base):
    base = copy("bert")
    shutil.copy(Path(tiny_base("gpt2").name) / SINGLE, folder_of(base))
    refused(base, "tensors are missing", "not of one model")


# --- shards ---------------------------------------------------------------------------------------------------------------


def test_a_sharded_base_loads_as_the_single_file(copy, tiny_base):
    base = copy("bert")
    shard(base)
    one, two = (load_task_model(b, LABELLED, seed=0).state_dict() for b in (base, tiny_base("bert")))
    assert all(torch.equal(one[k], two[k]) for k in two)


def test_a_missing_shard_a_cut_one_and_a_tensor_in_two(copy):
    base = copy("bert")
    files = sorted(set(shard(base).values()))
    path = folder_of(base) / files[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    refused(base, files[1])
    path.write_bytes((folder_of(base) / files[0]).read_bytes())
    refused(base, "is in two shards", files[1])
    path.unlink()
    refused(base, files[1], "not there")


def test_an_index_that_omits_a_shard(copy):
    base = copy("bert")
    files = shard(base)
    kept = {n: f for n, f in files.items() if f != max(files.values())}
    (folder_of(base) / f"{SINGLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": kept}))
    refused(base, "tensors are missing")


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {}}', '{"weight_map": {"a": "../a.safetensors"}}', "{"])
def test_a_damaged_index(copy, index):
    base = copy("bert")
    shard(base)
    (folder_of(base) / f"{SINGLE}.index.json").write_text(index)
    refused(base, "index.json")


# --- mismatched and unexpected --------------------------------------------------------------------------------------------


def test_another_shape_is_refused_but_in_a_head_that_is_new_anyway(copy):
    base = copy("bert")
    change(base, lambda t: t | {"encoder.layer.0.attention.self.query.weight": torch.zeros(16, 32)})
    refused(base, "attention.self.query.weight", "(16, 32)", "(32, 32)")


def test_the_trained_head_of_another_task_is_replaced(copy, tiny_base):
    base = copy("bert")
    trained = hf.AutoModelForSequenceClassification.from_pretrained(base.name, num_labels=5)
    trained.save_pretrained(base.name)
    found = load_task_model(base, LABELLED, seed=0)
    wanted = load_task_model(tiny_base("bert"), LABELLED, seed=0)
    assert torch.equal(found.classifier.weight, wanted.classifier.weight)


def test_tensors_of_another_head_are_named_once_and_others_refused(copy, capfd):
    base = copy("bert")
    hf.BertForPreTraining.from_pretrained(base.name).save_pretrained(base.name)
    capfd.readouterr()
    for _ in range(2):
        load_task_model(base, LABELLED, seed=0)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "cls.predictions" in said and "cls.seq_relationship" in said
    change(base, lambda t: t | {"bert.encoder.layer.2.output.dense.bias": torch.zeros(32)})
    refused(base, "no place for", "layer.2.output.dense.bias")


def test_heads_that_no_list_knows_are_asked_of_transformers(tmp_path, tiny_base, copy):
    sizes = {"vocab_size": 65, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
    config = hf.ModernBertConfig(
        **sizes, intermediate_size=48, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2
    )
    hf.ModernBertForMaskedLM(config).save_pretrained(tmp_path / "modern")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny_base("bert").name) / file, tmp_path / "modern")
    base = BaseModel(str(tmp_path / "modern"), device="cpu")
    assert load_task_model(base, LABELLED, seed=0).classifier.weight.shape == (2, 32)
    base = copy("bert")
    change(base, lambda t: t | {"nonsense.weight": torch.zeros(2)})
    refused(base, "no place for", "nonsense.weight")


def test_buffers_of_old_files_are_passed_over(copy, capfd):
    base = copy("bert")
    change(base, lambda t: t | {"embeddings.position_ids": torch.arange(64)[None]})
    load_task_model(base, LABELLED, seed=0)
    assert capfd.readouterr().err == ""


# --- what is no base ------------------------------------------------------------------------------------------------------


def test_pickled_weights_are_refused_with_the_way_out(copy):
    base = copy("bert")
    tensors = load_file(folder_of(base) / SINGLE)
    (folder_of(base) / SINGLE).unlink()
    torch.save(tensors, folder_of(base) / "pytorch_model.bin")
    refused(base, "pytorch_model.bin", "pickle", "save_pretrained")
    with pytest.raises(InputError, match="pickle"):
        base_fingerprint(base)


def test_an_adapter_folder_is_no_base(copy):
    base = copy("bert")
    (folder_of(base) / "adapter_config.json").write_text('{"base_model_name_or_path": "user/base"}')
    refused(base, "an adapter, not a base")


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 0}, {"hidden_size": 10**7}, {"hidden_size": "32"}, {"vocab_size": 10**9}, {"num_hidden_layers": 10**8},
        {"intermediate_size": 10**8}, {"max_position_embeddings": 10**9}, {"num_attention_heads": 0}, {"hidden_size": -32},
        {"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"model_type": "nonsense"}, {"model_type": 5}, {"hidden_act": "nonsense"},
        {"transformers_weights": "other.safetensors"}, {"vocab_size": True},
    ],
)  # fmt: skip
def test_a_config_that_is_not_of_these_weights(copy, fields):
    base = copy("bert")
    configure(base, **fields)
    refused(base, str(folder_of(base)))


@pytest.mark.parametrize("text", ["[]", "5", "null", "{", ""])
def test_a_config_that_is_no_config(copy, text):
    base = copy("llama")
    (folder_of(base) / "config.json").write_text(text)
    refused(base, "config.json", kind="causal")


def test_cut_weights(copy):
    base = copy("llama")
    path = folder_of(base) / SINGLE
    path.write_bytes(path.read_bytes()[:500])
    refused(base, SINGLE, kind="causal")


# --- tokenizers -----------------------------------------------------------------------------------------------------------


def test_a_base_without_its_tokenizer_is_refused(copy):
    for architecture in ("bert", "llama", "t5"):
        base = copy(architecture)
        for file in folder_of(base).glob("*token*"):
            file.unlink()
        with pytest.raises(InputError) as caught:
            load_tokenizer(base)
        assert "tokenizer" in str(caught.value)


def test_half_a_tokenizer_is_refused(tmp_path, tiny_base):
    shutil.copytree(tiny_base("gpt2").name, tmp_path / "gpt2")
    for file in (tmp_path / "gpt2").glob("*token*"):
        file.unlink()
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1}))
    with pytest.raises(InputError, match="merges"):
        load_tokenizer(BaseModel(str(tmp_path / "gpt2"), device="cpu"))
    (tmp_path / "gpt2" / "merges.txt").write_text("#version: 0.2\n")
    assert load_tokenizer(BaseModel(str(tmp_path / "gpt2"), device="cpu")).padding_side == "right"


def test_a_damaged_tokenizer_is_refused_in_one_line(copy):
    base = copy("bert")
    (folder_of(base) / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(InputError) as caught:
        load_tokenizer(base)
    assert "\n" not in str(caught.value)


# --- fingerprints ---------------------------------------------------------------------------------------------------------


def test_every_file_that_is_loaded_counts_and_no_other(copy):
    base = copy("bert")
    configure(base, transformers_version="0")  # any change of the config
    seen = [base_fingerprint(base)]
    assert seen[0].startswith("files:")

    def different() -> None:
        found = base_fingerprint(base)
        assert found not in seen
        seen.append(found)

    change(base, lambda t: t | {"embeddings.word_embeddings.weight": 2 * t["embeddings.word_embeddings.weight"]})
    different()
    configure(base, layer_norm_eps=1e-3)
    different()
    tokenizer = folder_of(base) / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("w59", "w60"))
    different()
    (folder_of(base) / "generation_config.json").write_text("{}")
    different()
    for other in ("pytorch_model.bin", "other.safetensors", "README.md"):
        (folder_of(base) / other).write_bytes(b"anything")
        assert base_fingerprint(base) == seen[-1]


def test_shards_count_by_the_index(copy):
    base = copy("bert")
    files = shard(base)
    first = base_fingerprint(base)
    save_file({"left.over": torch.zeros(2)}, folder_of(base) / "model-00009-of-00009.safetensors")
    assert base_fingerprint(base) == first
    path = folder_of(base) / max(files.values())
    with safe_open(path, "pt") as f:
        tensors = {k: f.get_tensor(k) + 1 for k in f.keys()}  # noqa: SIM118 (no mapping)
    save_file(tensors, path, metadata={"format": "pt"})
    assert base_fingerprint(base) != first


def test_records_of_an_earlier_plait_still_compare(copy, tiny_base):
    base, other = copy("bert"), tiny_base("roberta")
    earlier = {"base_sha256": earlier_fingerprint(base)}
    assert ":" not in earlier["base_sha256"]
    assert same_weights(earlier, base_facts(base)) is True
    assert same_weights(earlier, base_facts(other)) is False
    assert same_weights({"base_sha256": "commit:" + 40 * "a"}, base_facts(base)) is None
    assert same_weights({}, base_facts(base)) is None
    (folder_of(base) / "tokenizer.json").write_text("{}")  # the newer kind sees what the earlier did not
    assert same_weights(base_facts(base), base_facts(tiny_base("bert"))) is False
    assert same_weights(earlier, base_facts(base)) is True
