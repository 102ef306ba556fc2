"""vLLM's, llama.cpp's, diffusers' and mlx-lm's rules: what is taken, what needs a flag, what is dropped or refused."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from plait.errors import InputError, RunError
from plait.loading import accounts, require_loadable
from plait.loading.vllm import RANKS, rank_flag
from tests.loading.planted import ROOT, add, causal, change, classifier, configure, save_adapter, turned

LLM = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain adapter's files, to be copied and changed."""
    return save_adapter(tmp_path_factory.mktemp("plain") / "adapter", causal(), **LLM)


@pytest.fixture
def adapter(plain, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((plain / name).read_bytes())
    return folder


def of(path, loader):
    (account,) = accounts(path, [loader])
    return account


@pytest.mark.parametrize("loader", ["vllm", "llama.cpp", "trl", "axolotl", "llama-factory", "unsloth", "transformers"])
def test_a_plain_adapter_is_taken_whole(adapter, loader):
    account = of(adapter, loader)
    assert not account.faults and account.count("loaded") == 8 == len(account.placements)


@pytest.mark.parametrize(("rank", "flag"), [(1, 1), (2, 8), (16, 16), (24, 32), (257, 320), (512, 512), (513, None)])
def test_the_smallest_rank_of_vllm_that_holds(rank, flag):
    assert rank_flag(rank) == flag and (flag is None or flag in RANKS)


def test_vllm_needs_a_flag_for_the_largest_rank_that_the_config_names(adapter):
    change(adapter, configure(rank_pattern={"nowhere": 24}))
    assert "--max-lora-rank 32" in " ".join(of(adapter, "vllm").notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
        ({"bias": "all"}, "trained biases"),
        ({"r": 1024}, "above what vLLM takes"),
        ({"rank_pattern": {"q_proj": 600}}, "above what vLLM takes"),
        ({"lora_alpha": None}, "asks for it"),
        ({"r": 4}, "by which vLLM divides alpha"),
    ],
)
def test_what_vllm_refuses_or_gets_wrong_is_named(adapter, changes, words):
    change(adapter, configure(**changes))
    assert any(words in f.what for f in of(adapter, "vllm").faults)


@pytest.mark.parametrize(
    "name",
    [
        f"{ROOT}model.norm.weight",
        f"{ROOT}model.layers.0.self_attn.q_proj.lora_A.work.weight",
        f"{ROOT}model.embed_tokens.weight",
    ],
)
def test_a_name_unknown_to_vllm_refuses_all(adapter, name):
    change(adapter, add(name, 2, 16))
    account = of(adapter, "vllm")
    assert account.count("refused") == 9 and any(f.tensor == name and f.raises for f in account.faults)


def test_vllm_takes_a_head_that_is_declared(tmp_path):
    folder = save_adapter(tmp_path / "a", classifier(), task_type="SEQ_CLS", target_modules=["query"])
    account = of(folder, "vllm")
    assert not account.faults and {p.parameter for p in account.placements if p.effect == "replaces"} == {
        "classifier.weight", "classifier.bias",
    }  # fmt: skip
    change(folder, configure(modules_to_save=None))
    assert any("taken for half of the factors" in f.what for f in of(folder, "vllm").faults)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern"),
        ({"use_rslora": True}, "use_rslora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
)
def test_what_llama_cpps_converter_passes_over_is_named(adapter, changes, key):
    change(adapter, configure(**changes))
    assert key in {f.tensor for f in of(adapter, "llama.cpp").faults}


@pytest.mark.parametrize("loader", ["vllm", "llama.cpp", "peft", "transformers"])
def test_factors_that_lie_the_other_way_round_are_told(adapter, loader):
    change(adapter, turned)
    assert sum("multiplied with" in f.what for f in of(adapter, loader).faults) == 2


def test_ranks_alone_are_right_in_llama_cpp(adapter):
    change(adapter, configure(rank_pattern={"nowhere": 3}))
    assert not of(adapter, "llama.cpp").faults


def test_unsloth_stops_at_a_config_of_a_model_beside(adapter):
    (adapter / "config.json").write_text("{}")
    assert of(adapter, "unsloth").faults and not of(adapter, "trl").faults


# --- GGUF -------------------------------------------------------------------------------------------------------------


def gguf(path, tensors, values=None):
    """Write a GGUF header by hand: texts, floats, and tensors of float32 whose data is left out."""
    values = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": "llama",
        "adapter.lora.alpha": 4.0,
    } | (values or {})
    values = {k: v for k, v in values.items() if v is not None}
    out = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values))]
    text = lambda s: struct.pack("<Q", len(s)) + s.encode()  # noqa: E731
    for key, value in values.items():
        out.append(
            text(key) + (struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<If", 6, value))
        )
    for name, shape in tensors.items():
        out.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 0, 0))
    path.write_bytes(b"".join(out))
    return path


PAIR = {"blk.0.attn_q.weight.lora_a": (2, 16), "blk.0.attn_q.weight.lora_b": (16, 2)}


def test_a_gguf_adapter_is_taken(tmp_path):
    path = gguf(tmp_path / "a.gguf", {**PAIR, "token_embd.weight.lora_a": (40, 2), "token_embd.weight.lora_b": (16, 2)})
    account = of(path, "llama.cpp")
    assert not account.faults and account.own and account.count("loaded") == 4
    assert require_loadable(path) == tuple(a for a in accounts(path) if a.own)


@pytest.mark.parametrize(
    ("tensors", "values", "words"),
    [
        ({"blk.0.attn_q.weight.lora_a": (2, 16)}, {}, "no other half"),
        ({"blk.0.attn_q.weight.lora_a": (16, 2), "blk.0.attn_q.weight.lora_b": (16, 2)}, {}, "(rank, in)"),
        ({**PAIR, "blk.0.attn_q.weight": (16, 16)}, {}, "unknown suffix"),
        ({**PAIR, "blk.0.attn_norm.weight": (16,)}, {}, "skipped in silence"),
        (PAIR, {"general.type": "model"}, "expected 'adapter'"),
        (PAIR, {"adapter.type": None}, "expected 'lora'"),
        (PAIR, {"adapter.lora.alpha": None}, "scaling is then 1"),
    ],
)
def test_a_faulty_gguf_adapter_is_told(tmp_path, tensors, values, words):
    path = gguf(tmp_path / "a.gguf", tensors, values)
    assert any(words in f.what for f in of(path, "llama.cpp").faults)
    with pytest.raises(RunError, match="llama"):
        require_loadable(path)


@pytest.mark.parametrize("cut", [5, 23, 60, 120])
def test_a_gguf_header_that_is_cut_off_is_refused(tmp_path, cut):
    path = gguf(tmp_path / "a.gguf", PAIR)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="damaged"):
        accounts(path)


# --- files of image models, MLX ---------------------------------------------------------------------------------------


def file_of(path, tensors, metadata=None):
    save_file({n: torch.ones(s) for n, s in tensors.items()}, path, metadata)
    return path


KOHYA = {f"lora_unet_mid_block_attentions_0_proj_in.{k}": s for k, s in
         {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2), "alpha": ()}.items()}  # fmt: skip


@pytest.mark.parametrize(
    "tensors",
    [
        KOHYA,
        {
            "unet.mid_block.attentions.0.proj_in.lora_A.weight": (2, 6),
            "unet.mid_block.attentions.0.proj_in.lora_B.weight": (8, 2),
        },
        {"text_encoder.layers.0.q.lora.down.weight": (2, 6), "text_encoder.layers.0.q.lora.up.weight": (8, 2)},
        {
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (2, 6),
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": (8, 2),
        },
    ],
)
def test_files_of_image_models_are_taken(tmp_path, tensors):
    account = of(file_of(tmp_path / "a.safetensors", tensors), "diffusers")
    assert not account.faults and account.count("loaded") == len(tensors)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": None}, "without up"),
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (8, 3)}, "not of one rank"),
        ({"lora_unet_mid_block_attentions_0_proj_in.alpha": (2,)}, "expected one number"),
        ({"lora_unet_conv_in.weight": (8, 2)}, "no name of factors"),
        ({"unet.conv_in.lora_A.default.weight": (2, 6)}, "an adapter's name"),
        ({"lora_unet_conv_in.lora_down.weight": (0,)}, "is empty"),
    ],
)
def test_a_faulty_file_is_told(tmp_path, changes, words):
    tensors = {n: s for n, s in {**KOHYA, **changes}.items() if s is not None}
    path = file_of(tmp_path / "a.safetensors", tensors)
    assert any(words in f.what for f in of(path, "diffusers").faults)
    with pytest.raises(RunError, match="diffusers"):
        require_loadable(path)


def test_a_file_of_no_factors_is_no_business_of_loaders(tmp_path):
    path = file_of(tmp_path / "sst2.stats.safetensors", {"site.sum": (3,)})
    assert require_loadable(path) == ()
    with pytest.raises(InputError, match="no adapter"):
        accounts(path)


def mlx(folder, tensors, config):
    folder.mkdir()
    file_of(folder / "adapters.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_mlx_adapters(tmp_path):
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}
    pair = {"model.layers.0.self_attn.q_proj.lora_a": (16, 2), "model.layers.0.self_attn.q_proj.lora_b": (2, 16)}
    assert not of(mlx(tmp_path / "sound", pair, config), "mlx-lm").faults
    for name, tensors, said in (
        ("half", dict([next(iter(pair.items()))]), "no other half"),
        ("rank", {**pair, "model.layers.0.self_attn.q_proj.lora_b": (3, 16)}, "rank 2"),
        ("foreign", {**pair, "model.norm.weight": (16,)}, "written over"),
    ):
        assert any(said in f.what for f in of(mlx(tmp_path / name, tensors, config), "mlx-lm").faults), name
    assert of(mlx(tmp_path / "config", pair, {}), "mlx-lm").faults


# --- whole models -----------------------------------------------------------------------------------------------------


def model(folder, files, index=None, config=None):
    folder.mkdir()
    for name, tensors in files.items():
        file_of(folder / name, tensors)
    (folder / "config.json").write_text(json.dumps(config or {}))
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_whole_models(tmp_path):
    one = model(tmp_path / "one", {"model.safetensors": {"a.weight": (2, 2)}}, config={"tie_word_embeddings": True})
    account = of(one, "transformers")
    assert account.own and not account.faults and "tied" in account.notes[0]
    two = {"m-1.safetensors": {"a.weight": (2, 2)}, "m-2.safetensors": {"b.weight": (2, 2)}}
    index = {"a.weight": "m-1.safetensors", "b.weight": "m-2.safetensors"}
    assert not of(model(tmp_path / "two", two, index), "transformers").faults
    for name, files, more, said in (
        ("gone", {"m-1.safetensors": {"a.weight": (2, 2)}}, {}, "which is gone"),
        ("lost", two, {"c.weight": "m-2.safetensors"}, "where model.safetensors.index.json says"),
        ("twice", {**two, "m-2.safetensors": {"b.weight": (2, 2), "a.weight": (2, 2)}}, {}, "the one read last"),
        ("unbaked", {**two, "m-2.safetensors": {"b.weight": (2, 2), "a.lora_A.weight": (2, 2)}}, {}, "PEFT leaves"),
        ("empty", {**two, "m-2.safetensors": {"b.weight": (0,)}}, {}, "is empty"),
    ):
        folder = model(tmp_path / name, files, {**index, **more})
        assert any(said in f.what for f in of(folder, "transformers").faults), name
        with pytest.raises(RunError, match="transformers"):
            require_loadable(folder)
