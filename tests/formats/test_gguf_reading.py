"""GGUF adapters in: what llama.cpp adds to a weight, with its names and its order of q's and k's rows, as PEFT has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.peft_format import read_adapter
from plait.adapters.sealed import SEAL, SEALED
from plait.errors import Damaged, InputError, PlaitError, UsageError
from plait.formats.convert import convert
from plait.formats.export import export
from plait.formats.gguf_file import gguf_record
from plait.formats.gguf_reading import read_gguf
from plait.formats.reading import read_any
from tests.command import call

gguf = pytest.importorskip("gguf")

W, HEADS, KV, FF, VOCABULARY = 32, 4, 2, 48, 96
SHAPES = {
    "self_attn.q_proj": (W, W),
    "self_attn.k_proj": (W // HEADS * KV, W),
    "self_attn.v_proj": (W // HEADS * KV, W),
    "self_attn.o_proj": (W, W),
    "mlp.gate_proj": (FF, W),
    "mlp.up_proj": (FF, W),
    "mlp.down_proj": (W, FF),
}
CPP = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
CPP |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


@pytest.fixture
def base(tmp_path):
    """base("llama") -> a folder with config and weights."""

    def make(kind, tied=False):
        folder = tmp_path / kind
        folder.mkdir()
        config = {"model_type": kind, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": KV}
        config |= {"hidden_size": W, "tie_word_embeddings": tied}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {f"model.layers.{i}.{n}.weight": torch.randn(s) for i in range(2) for n, s in SHAPES.items()}
        tensors |= {f"model.layers.{i}.input_layernorm.weight": torch.ones(W) for i in range(2)}
        tensors |= {
            "model.embed_tokens.weight": torch.randn(VOCABULARY, W),
            "lm_head.weight": torch.randn(VOCABULARY, W),
        }
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def interleaved(rows, heads):
    """llama.cpp's order: neighbours in a pair are rotated together, where transformers rotates a head's halves."""
    half = rows.shape[0] // heads // 2
    order = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return rows[order]


def written(
    path, architecture, *, alpha=12.0, rank=4, permuted=True, dtype=None, more=(), kind="lora", extra_half=True
):
    """A GGUF adapter by the gguf package, and the updates it means: scaling * B @ A by transformers' name."""
    generator = torch.Generator().manual_seed(7)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    deltas = {}
    for layer in range(2):
        for name, (out, width) in SHAPES.items():
            A, B = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
            if dtype == np.float16:
                A, B = A.half().float(), B.half().float()
            last = name.rpartition(".")[2]
            deltas[f"model.layers.{layer}.{name}"] = (alpha / rank if alpha else 1.0) * B.double() @ A.double()
            stored = (
                interleaved(B, {"q_proj": HEADS, "k_proj": KV}[last])
                if permuted and last in ("q_proj", "k_proj")
                else B
            )
            for half, tensor in (("a", A), ("b", stored)):
                if half == "b" and not extra_half and layer == 1 and last == "q_proj":
                    continue
                writer.add_tensor(
                    f"blk.{layer}.{CPP[last]}.weight.lora_{half}", tensor.numpy().astype(dtype or np.float32)
                )
    for name, tensor in more:
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return deltas


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("kind", "architecture", "permuted"), [("llama", "llama", True), ("qwen2", "qwen2", False)])
def test_the_update_is_what_llama_cpp_adds(base, tmp_path, kind, architecture, permuted, dtype):
    deltas = written(tmp_path / "a.gguf", architecture, permuted=permuted, dtype=dtype)
    found = convert(tmp_path / "a.gguf", tmp_path / "peft", means=_means(base(kind)))
    assert found.record.origin == "gguf" and found.record.verification_error < 1e-6
    adapter = read_adapter(tmp_path / "peft")
    assert set(adapter.modules) == set(deltas) and adapter.task_type == "CAUSAL_LM"
    for name, delta in deltas.items():
        torch.testing.assert_close(adapter.modules[name].delta(torch.float64), delta, rtol=1e-6, atol=1e-6)


def _means(folder):
    from plait.formats.plain import Means

    return Means(base=folder)


@pytest.mark.parametrize("alpha", [0.0, None])
def test_without_alpha_scaling_is_1_as_llama_cpp_has_it(base, tmp_path, alpha):
    deltas = written(tmp_path / "a.gguf", "llama", alpha=alpha)
    convert(tmp_path / "a.gguf", tmp_path / "peft", means=_means(base("llama")))
    for name, f in read_adapter(tmp_path / "peft").modules.items():
        torch.testing.assert_close(f.delta(torch.float64), deltas[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_there_and_back(base, tmp_path, kind):
    """PEFT -> GGUF -> PEFT: the same factors, to the bit."""
    folder = base(kind)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    names = [f"model.layers.{i}.{n}" for i in range(2) for n in SHAPES] + ["model.embed_tokens"]
    for name in names:
        out, width = SHAPES.get(name.split(".", 3)[-1], (W, VOCABULARY))
        a, b = (
            ("lora_embedding_A", "lora_embedding_B") if name.endswith("tokens") else ("lora_A.weight", "lora_B.weight")
        )
        tensors[f"base_model.model.{name}.{a}"] = torch.randn(4, width, generator=generator)
        tensors[f"base_model.model.{name}.{b}"] = torch.randn(out, 4, generator=generator)
    (tmp_path / "p").mkdir()
    save_file(tensors, tmp_path / "p" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(folder)}))
    export(tmp_path / "p", tmp_path / "x.gguf", loader="gguf", base=folder)
    convert(tmp_path / "x.gguf", tmp_path / "back", means=_means(folder))
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], v) for k, v in tensors.items())
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["lora_alpha"] == 10


def exported(base, tmp_path):
    folder = base("llama")
    update = {"lora_A": torch.randn(4, W), "lora_B": torch.randn(W, 4)}
    (tmp_path / "p").mkdir()
    save_file(
        {f"base_model.model.model.layers.0.self_attn.q_proj.{k}.weight": t for k, t in update.items()},
        tmp_path / "p" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(folder)}))
    export(tmp_path / "p", tmp_path / "x.gguf", loader="gguf", base=folder)
    return folder, tmp_path / "x.gguf"


def test_a_changed_byte_of_a_file_of_plaits_is_noticed_or_changes_nothing(capsys, base, tmp_path):
    folder, path = exported(base, tmp_path)

    def meant():
        found = read_gguf(path, folder)
        return {m: (f.A.tolist(), f.B.tolist(), f.scaling) for m, f in found.modules.items()}, gguf_record(path)

    whole, wanted, noticed = path.read_bytes(), meant(), 0
    assert {SEAL, SEALED} <= gguf.GGUFReader(str(path)).fields.keys()
    drawn = np.random.default_rng(0)
    places = sorted(drawn.choice(len(whole), 300, replace=False).tolist())
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << int(drawn.integers(8))
        path.write_bytes(data)
        try:
            assert meant() == wanted, place
        except PlaitError:
            noticed += 1
    assert noticed > 250
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Damaged, match="not the file that was written"):
        export(tmp_path / "p", path, loader="gguf", base=folder)
    code, out, err = call(capsys, "check", path)
    assert code == 3 and "x.gguf" in err and "changed since it was written" in out
    path.write_bytes(whole)
    assert call(capsys, "check", path)[0] == 0


REFUSED = [
    ({"kind": "other"}, "llama", "no LoRA adapter"),
    ({"extra_half": False}, "llama", "has no lora_b"),
    ({"more": [("blk.0.attn_norm.weight", torch.ones(W))]}, "llama", "no half"),
    ({"more": [("blk.9.attn_q.weight.lora_a", torch.ones(4, W))]}, "llama", "another --base"),
    ({}, "qwen2", "adapts a llama model"),
    ({"more": [("output.weight.lora_a", torch.ones(4, W)), ("output.weight.lora_b", torch.ones(8, 4))]}, "llama", "is an update"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED)
def test_what_cannot_be_read_is_named(base, tmp_path, changes, kind, message):
    written(tmp_path / "a.gguf", "llama", **changes)
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "a.gguf", tmp_path / "peft", means=_means(base(kind)))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, b"{}" * 100])
def test_damaged_files(base, tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        convert(tmp_path / "a.gguf", tmp_path / "peft", means=_means(base("llama")))


def test_the_questions_it_asks(tmp_path):
    written(tmp_path / "a.gguf", "llama")
    with pytest.raises(UsageError, match="which base"):
        convert(tmp_path / "a.gguf", tmp_path / "peft")
    with pytest.raises(InputError, match="plait convert"):
        read_any(tmp_path / "a.gguf")


@pytest.mark.skipif(
    not os.environ.get("PLAIT_LLAMA_CPP"), reason="PLAIT_LLAMA_CPP names no folder with llama.cpp's converters"
)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_llama_cpps_own_converter_wrote(base, tmp_path, kind):
    """llama.cpp's convert_lora_to_gguf.py, run as it is, then read here: PEFT's update again, in float32."""
    folder = base(kind)
    config = json.loads((folder / "config.json").read_text())
    name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]
    config |= {
        "architectures": [name],
        "vocab_size": VOCABULARY,
        "intermediate_size": FF,
        "max_position_embeddings": 64,
    }
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(2)
    names = {f"model.layers.{i}.{n}": s for i in range(2) for n, s in SHAPES.items()}
    tensors, deltas = {}, {}
    for module, (out, width) in names.items():
        A, B = torch.randn(4, width, generator=generator), torch.randn(out, 4, generator=generator)
        tensors |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
        deltas[module] = 2.5 * B.double() @ A.double()
    (tmp_path / "p").mkdir()
    save_file(tensors, tmp_path / "p" / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps({**about, "base_model_name_or_path": str(folder)}))
    script = Path(os.environ["PLAIT_LLAMA_CPP"]) / "convert_lora_to_gguf.py"
    arguments = ["--base", folder, "--outfile", tmp_path / "x.gguf", "--outtype", "f32", tmp_path / "p"]
    subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True)
    found = convert(tmp_path / "x.gguf", tmp_path / "back", means=_means(folder))
    assert found.record.verification_error < 1e-6
    modules = read_adapter(tmp_path / "back").modules
    assert set(modules) == set(deltas)
    for module, f in modules.items():
        torch.testing.assert_close(f.delta(torch.float64), deltas[module], rtol=1e-6, atol=1e-6)
