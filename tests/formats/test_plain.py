"""Variants turned into plain LoRA, against PEFT's own merged weights on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.peft_format import read_adapter, write_adapter
from plait.disk.store import read_json
from plait.errors import InputError
from plait.formats import lowrank
from plait.formats.convert import convert
from plait.formats.lowrank import best_rank
from plait.formats.plain import Means
from tests.loading.planted import causal, save_adapter
from tests.merging.test_same_bytes import threads

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}


def trained(tiny_base, architecture: str, folder: Path, **options) -> tuple[Path, dict[str, torch.Tensor], Path]:
    """A folder PEFT saved of a model with every trained tensor changed at random, and its merged weights."""
    import peft
    import transformers

    base = tiny_base(architecture)
    model = transformers.AutoModelForCausalLM.from_pretrained(base.name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        **{
            "r": 2,
            "lora_alpha": 8,
            "target_modules": TARGETS[architecture],
            "fan_in_fan_out": architecture == "gpt2",
            **options,
        },
    )
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    merged = wrapped.merge_and_unload().state_dict()
    changed = {k: v.clone() for k, v in merged.items() if k in before and not torch.equal(v, before[k])}
    return Path(base.name), {k: changed[k] - before[k] for k in changed}, folder


def deltas(folder: Path, transposed: bool = False) -> dict[str, torch.Tensor]:
    """Weight name -> dense update, as the base stores it."""
    adapter = read_adapter(folder)
    return {
        f"{adapter.full_name(m)}.weight": f.delta().T if transposed or f.kind == "embedding" else f.delta()
        for m, f in adapter.modules.items()
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dora_at_full_rank_is_pefts_merge(tiny_base, tmp_path, architecture):
    base, wanted, folder = trained(tiny_base, architecture, tmp_path / "dora", use_dora=True, use_rslora=True)
    found = convert(folder, tmp_path / "plain", means=Means(base=base, rank=64))
    dora = next(c for c in found.record.conversions if "DoRA" in c.what)
    assert dora.exact
    got = deltas(tmp_path / "plain", architecture == "gpt2")
    assert got.keys() == wanted.keys()
    for key, delta in wanted.items():
        torch.testing.assert_close(got[key], delta, rtol=1e-4, atol=2e-6)


def test_dora_error_is_that_of_the_svd(tiny_base, tmp_path):
    base, wanted, folder = trained(tiny_base, "llama", tmp_path / "dora", use_dora=True)
    found = convert(folder, tmp_path / "plain", means=Means(base=base)).record.conversions[0]
    spectra = [torch.linalg.svdvals(d.double()).square() for d in wanted.values()]
    error = (sum(s[2:].sum() for s in spectra) / sum(s.sum() for s in spectra)).sqrt()
    assert found.relative_error == pytest.approx(float(error), rel=1e-3)
    assert found.rank == 2
    assert not found.exact
    left = sum((deltas(tmp_path / "plain")[k] - d).square().sum() for k, d in wanted.items())
    assert float((left / sum(s.sum() for s in spectra)).sqrt()) == pytest.approx(float(error), rel=1e-3)
    assert list(found.errors_at) == ["2", "4", "8", "16"]


def test_dora_needs_the_right_base(tiny_base, tmp_path):
    base, _, folder = trained(tiny_base, "llama", tmp_path / "dora", use_dora=True)
    with pytest.raises(InputError, match="--base"):
        convert(folder, tmp_path / "plain")
    other = Path(tiny_base("gpt2").name)
    with pytest.raises(InputError, match="holds no weight"):
        convert(folder, tmp_path / "plain", means=Means(base=other))
    config = read_json(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    with pytest.raises(InputError, match="use_dora is not set, and the file holds magnitudes"):
        convert(folder, tmp_path / "plain", means=Means(base=base))
    assert not (tmp_path / "plain").exists()


def test_trained_embedding_at_full_rank_is_exact(tiny_base, tmp_path):
    base, wanted, folder = trained(tiny_base, "llama", tmp_path / "e", modules_to_save=["embed_tokens"])
    with pytest.raises(InputError, match=r"embed_tokens.*--base"):
        convert(folder, tmp_path / "plain")
    found = convert(folder, tmp_path / "plain", means=Means(base=base, rank=64))
    assert found.record.conversions[0].exact
    got = deltas(tmp_path / "plain")
    assert "model.embed_tokens.weight" in wanted
    for key, delta in wanted.items():
        torch.testing.assert_close(got[key], delta, rtol=1e-4, atol=2e-6)
    error = convert(folder, tmp_path / "short", means=Means(base=base)).record.conversions[0].relative_error
    assert 0.5 < error < 1.0  # white noise in 32 dimensions, two kept


def test_targets_stay_as_they_are_named_where_no_module_comes_or_goes(tiny_base, tmp_path):
    base, _, folder = trained(tiny_base, "llama", tmp_path / "e", modules_to_save=["embed_tokens"])
    convert(folder, tmp_path / "more", means=Means(base=base))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    (embedding,) = (k for k in tensors if "embed_tokens" in k)
    tensors[embedding] = load_file(base / "model.safetensors")["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    convert(folder, tmp_path / "same", means=Means(base=base))  # trained whole, and not changed: left out
    named = {n: read_json(tmp_path / n / "adapter_config.json")["target_modules"] for n in ("more", "same")}
    assert named["same"] == sorted(TARGETS["llama"])
    assert all("." in module for module in named["more"]) and len(named["more"]) > 2


def test_trained_tokens_are_exact(tiny_base, tmp_path):
    base, wanted, folder = trained(tiny_base, "llama", tmp_path / "t", trainable_token_indices=[7, 3, 11])
    found = convert(folder, tmp_path / "plain", means=Means(base=base))
    assert found.record.conversions[0].exact
    got = deltas(tmp_path / "plain")
    assert wanted["model.embed_tokens.weight"].abs().sum(1).nonzero().flatten().tolist() == [3, 7, 11]
    for key, delta in wanted.items():
        torch.testing.assert_close(got[key], delta, rtol=1e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT of its own biases
def test_biases_of_lora(tiny_base, tmp_path):
    _, wanted, folder = trained(tiny_base, "gpt2", tmp_path / "b", lora_bias=True)
    with pytest.raises(InputError, match=r"lora_bias: its biases \(norm"):
        convert(folder, tmp_path / "plain")
    found = convert(folder, tmp_path / "plain", means=Means(drop_bias=True)).record.conversions[0]
    assert not found.exact
    assert found.bias_norm > 0
    for key, delta in deltas(tmp_path / "plain", transposed=True).items():
        torch.testing.assert_close(delta, wanted[key], rtol=1e-4, atol=2e-6)


def test_pissa_with_its_start(tiny_base, tmp_path):
    import peft
    import transformers

    base = Path(tiny_base("llama").name)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "start")
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.5
    wrapped.save_pretrained(tmp_path / "end")
    with pytest.raises(InputError, match="--initial"):
        convert(tmp_path / "end", tmp_path / "plain")
    with pytest.raises(InputError, match="not what it was before"):
        convert(tmp_path / "end", tmp_path / "plain", means=Means(initial=tmp_path / "end"))
    found = convert(tmp_path / "end", tmp_path / "plain", means=Means(initial=tmp_path / "start"))
    assert found.record.conversions[0].exact
    merged = wrapped.merge_and_unload().state_dict()
    for key, delta in deltas(tmp_path / "plain").items():
        torch.testing.assert_close(delta, merged[key] - before[key], rtol=1e-4, atol=2e-6)


def test_rslora_is_written_plain(tiny_base, tmp_path):
    _, wanted, folder = trained(tiny_base, "llama", tmp_path / "rs", use_rslora=True)
    assert convert(folder, tmp_path / "plain").record.conversions[0].exact
    assert not read_json(tmp_path / "plain" / "adapter_config.json")["use_rslora"]
    for key, delta in deltas(tmp_path / "plain").items():
        torch.testing.assert_close(delta, wanted[key], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("shape", [(20, 9), (9, 20)])
def test_best_rank_is_the_truncated_svd(shape):
    delta = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    U, S, Vt = torch.linalg.svd(delta.double())
    cut = best_rank(delta, 3)
    torch.testing.assert_close(cut.factors.delta(torch.float64), (U[:, :3] * S[:3]) @ Vt[:3], rtol=1e-5, atol=1e-5)
    assert cut.lost[1] == pytest.approx(float(S[3:].square().sum()))
    assert cut.lost[2] == pytest.approx(float(S[6:].square().sum()))
    assert cut.lost[4] == pytest.approx(0.0, abs=1e-9)


def test_velora_is_read_as_the_lora_that_it_is(tmp_path):
    """What it saves beside the factors shortens inputs for the backward pass alone."""
    from peft import LoraConfig, PeftModel

    if not hasattr(LoraConfig, "velora_config"):
        pytest.skip("this PEFT knows no VeLoRA")
    folder = save_adapter(
        tmp_path / "a", causal(), task_type="CAUSAL_LM", target_modules=["q_proj"], velora_config={"num_groups": 4}
    )
    assert any("lora_velora_embed" in name for name in load_file(folder / "adapter_model.safetensors"))
    adapter = read_adapter(folder)
    model = PeftModel.from_pretrained(causal(), str(folder))
    for module, f in adapter.modules.items():
        wanted = model.get_submodule(f"base_model.model.{module}").get_delta_weight("default")
        assert torch.allclose(f.delta(), wanted, atol=1e-6)
    convert(folder, tmp_path / "plain")
    assert "velora_config" not in json.loads((tmp_path / "plain/adapter_config.json").read_text())


def test_plain_adapters_pass_unchanged(tiny_base, tmp_path):
    _, _, folder = trained(tiny_base, "llama", tmp_path / "p")
    assert convert(folder, tmp_path / "plain").record.conversions == ()
    before, after = read_adapter(folder), read_adapter(tmp_path / "plain")
    for module, f in before.modules.items():
        assert torch.equal(f.A, after.modules[module].A)
        assert torch.equal(f.B, after.modules[module].B)
        assert f.scaling == after.modules[module].scaling
    (tmp_path / "again").mkdir()
    write_adapter(tmp_path / "again", after)


@pytest.mark.parametrize("whole", [2048, 300])  # decomposed whole, or by power iterations
def test_the_bits_of_a_cut_do_not_hang_on_the_number_of_threads(monkeypatch, whole):
    monkeypatch.setattr(lowrank, "_WHOLE", whole)
    noise = torch.randn(512, 384, generator=torch.Generator().manual_seed(0))
    delta, cuts = (
        torch.linalg.qr(noise)[0],
        [],
    )  # singular values alike but for rounding: last bits decide which come first
    for count in (1, 2):
        with threads(count):
            cuts.append(best_rank(delta, 24).factors)
    assert torch.equal(cuts[0].A, cuts[1].A) and torch.equal(cuts[0].B, cuts[1].B)
