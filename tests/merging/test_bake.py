"""Baked models against base + adapter in PEFT."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.adapters.lineage import of_another_base
from plait.adapters.peft_format import read_adapter
from plait.disk.store import sha256_file
from plait.errors import InputError
from plait.merging import plan_merge
from plait.merging.bake import baking
from plait.merging.bake import writing as bake_writing
from plait.merging.bake.baking import bake
from plait.merging.bake.sites import merged_delta
from plait.model.stored import StoredTensor

IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def llama(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, shards: bool = True) -> Path:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def gpt2(folder: Path) -> Path:
    import transformers as hf

    torch.manual_seed(0)
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)).save_pretrained(
        folder
    )
    return folder


def lora(base: Path, folder: Path, targets: list[str], seed: int = 1, **kept) -> Path:
    import peft
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **kept)
    wrapped = peft.get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    import peft
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def test_sharded_llama_equals_base_plus_adapter(tmp_path):
    base = llama(tmp_path / "base")
    assert len(list(base.glob("*.safetensors"))) > 3
    adapter = lora(base, tmp_path / "a", ["q_proj", "v_proj", "down_proj"])
    done = bake(read_adapter(adapter), base, tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(base, adapter), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(tmp_path / "out"), logits(base), atol=1e-2)
    assert done.record.rounding_error < 1e-5 and done.record.verification_error < 1e-6 and done.record.dtype == ("F32",)
    assert {p.name for p in base.iterdir()} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert bake(read_adapter(adapter), base, tmp_path / "out").reused


def test_a_base_of_another_name_is_noted_and_the_same_one_elsewhere_is_not(tmp_path):
    base = llama(tmp_path / "base")
    adapter = read_adapter(lora(base, tmp_path / "a", ["q_proj"]))
    said = "right where both are the same weights"
    for named, place, noted in ((str(base), "base", False), ("org/Base", "base", False), ("org/other", "base", True)):
        done = bake(replace(adapter, base=named), tmp_path / place, tmp_path / f"out-{named.replace('/', '-')}")
        assert any(said in line for line in done.record.beside) == noted, named
    for name, noted in (("base", False), ("other", True)):
        shutil.copytree(base, tmp_path / "elsewhere" / name)
        where = tmp_path / "elsewhere" / name
        assert bool(of_another_base("org/base", where)) == noted
    assert of_another_base("", tmp_path) == []


@pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings=True")
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("shards", [True, False])
def test_tied_embeddings(tmp_path, targets, shards):
    base = llama(tmp_path / "base", tied=True, shards=shards)
    adapter = lora(base, tmp_path / "a", targets)
    done = bake(read_adapter(adapter), base, tmp_path / "out")
    assert done.record.untied == (targets != ["q_proj"])
    torch.testing.assert_close(logits(tmp_path / "out"), logits(base, adapter), atol=1e-5, rtol=1e-5)


def test_conv1d_weights_are_stored_transposed(tmp_path):
    base = gpt2(tmp_path / "base")
    adapter = lora(base, tmp_path / "a", ["c_attn", "attn.c_proj"], fan_in_fan_out=True)
    bake(read_adapter(adapter), base, tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(base, adapter), atol=1e-5, rtol=1e-5)


def test_bfloat16_says_what_rounding_took(tmp_path):
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter = lora(base, tmp_path / "a", ["q_proj", "v_proj"])
    done = bake(read_adapter(adapter), base, tmp_path / "out")
    assert (
        done.record.dtype == ("BF16",)
        and 1e-4 < done.record.rounding_error < 0.2
        and done.record.verification_error < 2**-7
    )
    from safetensors.torch import load_file

    parts = {k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(p).items()}
    assert {v.dtype for v in parts.values()} == {torch.bfloat16}
    before = {k: v for p in base.glob("*.safetensors") for k, v in load_file(p).items()}
    off = size = 0.0
    for module, f in read_adapter(adapter).modules.items():
        name = next(k for k in parts if k.endswith(f"{module}.weight"))
        exact = before[name].double() + f.delta().double()
        assert torch.equal(parts[name], exact.to(torch.bfloat16)), "summed in float32, with the bits of float64"
        off += float((parts[name].double() - exact).square().sum())
        size += float(f.delta(torch.float64).square().sum())
    assert done.record.rounding_error == pytest.approx((off / size) ** 0.5, rel=1e-5) and done.seconds_merge > 0


def test_a_dense_merge_is_baked_without_a_cut(tmp_path):
    base = llama(tmp_path / "base")
    pair = [read_adapter(lora(base, tmp_path / n, ["q_proj"], seed=i)) for i, n in enumerate("ab")]
    plan = plan_merge(pair, "ties", options={"density": 0.5, "scope": "module"}, scale=0.7, calibrate="pico")
    bake(plan, base, tmp_path / "out")
    from plait.model.stored import base_tensors

    before, after = base_tensors(base), base_tensors(tmp_path / "out")
    for module in plan.common.modules:
        b, a = before[f"{module}.weight"], after[f"{module}.weight"]
        found = a.read(0, a.shape[0]) - b.read(0, b.shape[0])
        torch.testing.assert_close(found, merged_delta(plan, module).dense(), atol=1e-6, rtol=1e-5)
        assert torch.linalg.matrix_rank(found, rtol=1e-4) > 8  # not what a rank-R adapter could hold
        norms = [float(adapter.modules[module].delta().norm()) for adapter in pair]
        assert float(found.norm()) == pytest.approx(
            0.7 * sum(norms) / 2, rel=1e-4
        )  # what pico restores, times the scale


def test_svc_is_baked_as_it_is_merged(tmp_path):
    base = llama(tmp_path / "base")
    pair = [read_adapter(lora(base, tmp_path / n, ["q_proj"], seed=i)) for i, n in enumerate("ab")]
    plan, plain = (plan_merge(pair, "task_arithmetic", scale=0.7, calibrate=c) for c in ("svc", None))
    for module, factors in plan.run("merged").adapter.modules.items():
        baked = merged_delta(plan, module).dense()
        torch.testing.assert_close(baked, factors.delta(torch.float32), atol=1e-6, rtol=1e-5)
        assert not torch.allclose(baked, merged_delta(plain, module).dense(), rtol=1e-2)


def test_a_rank_is_kept_and_extras_are_refused(tmp_path):
    base = llama(tmp_path / "base")
    pair = [read_adapter(lora(base, tmp_path / n, ["q_proj"], seed=i)) for i, n in enumerate("ab")]
    plan = plan_merge(pair, "task_arithmetic", rank=2, scale=1.0)
    module = next(iter(plan.common.modules))
    assert torch.linalg.matrix_rank(merged_delta(plan, module).dense(), rtol=1e-4) == 2
    trained = replace(pair[0], extras={"model.norm.weight": torch.ones(32)}, modules_to_save=("norm",))
    for source in (trained, plan_merge([trained], "task_arithmetic", scale=1.0)):
        with pytest.raises(InputError, match=r"model\.norm\.weight"):
            bake(source, base, tmp_path / "out")


def test_refused_bases_leave_nothing(tmp_path):
    base = llama(tmp_path / "base")
    adapter = read_adapter(lora(base, tmp_path / "a", ["q_proj"]))
    quantised = Path(shutil.copytree(base, tmp_path / "quantised"))
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"bitsandbytes base.*full-precision"):
        bake(adapter, quantised, tmp_path / "out")
    with pytest.raises(InputError, match="holds no weight for module"):
        bake(adapter, gpt2(tmp_path / "gpt2"), tmp_path / "out")
    shard = sorted(base.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        bake(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_base_is_no_part_of_the_result(tmp_path):
    """A base from a stranger may hold a link to a file of whoever bakes; weights, whose bytes are looked at, may lie elsewhere."""
    base = llama(tmp_path / "base", shards=False)
    adapter = lora(base, tmp_path / "a", ["q_proj"])
    (base / "model.safetensors").rename(tmp_path / "store.safetensors")
    (base / "model.safetensors").symlink_to(tmp_path / "store.safetensors")
    (tmp_path / "link").symlink_to(base)
    bake(read_adapter(adapter), tmp_path / "link", tmp_path / "whole")
    assert not (tmp_path / "whole" / "model.safetensors").is_symlink()
    (tmp_path / "id_rsa").write_text("SECRET")
    (base / "merges.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(InputError, match="a link to a file outside its folder") as refused:
        bake(read_adapter(adapter), base, tmp_path / "baked")
    assert refused.value.where == str(base / "merges.txt") and not (tmp_path / "baked").exists()


def test_a_copy_leaves_holes_where_it_is_written_over(tmp_path):
    """Every byte outside of them is the source's, and the hash is that of the whole source, wherever pieces end."""
    rng = torch.Generator().manual_seed(1)
    data = bytes(torch.randint(1, 256, (1000,), generator=rng, dtype=torch.uint8).tolist())
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(data)
    for size in (7, 64, 4096):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(bake_writing, "HASHED_BYTES_AT_ONCE", size)
            for holes in ([], [(0, 10)], [(3, 70), (70, 71), (500, 900)], [(990, 1000)], [(0, 1000)]):
                digest = bake_writing.copied(source, target, holes)
                wanted = bytearray(data)
                for start, stop in holes:
                    wanted[start:stop] = bytes(stop - start)
                assert target.read_bytes() == bytes(wanted) and digest == sha256_file(source)


def test_changed_weights_are_written_once(tmp_path, monkeypatch):
    """What is copied of a shard and what is written into it make up its bytes, none of them twice."""
    base = llama(tmp_path / "base")
    adapter = read_adapter(lora(base, tmp_path / "a", ["q_proj", "down_proj"]))
    written: dict[str, int] = {}
    copied, write = baking.copied, StoredTensor.write

    def counting(path, target, holes):
        written[path.name] = written.get(path.name, 0) + path.stat().st_size - sum(b - a for a, b in holes)
        return copied(path, target, holes)

    def counted(self, start, rows):
        written[self.file.name] += rows.nbytes
        write(self, start, rows)

    monkeypatch.setattr(baking, "copied", counting)
    monkeypatch.setattr(StoredTensor, "write", counted)
    baking.bake(adapter, base, tmp_path / "out")
    shards = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert shards and {name: written[name] for name in shards} == shards
