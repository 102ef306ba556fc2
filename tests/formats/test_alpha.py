"""Where alpha stands: beside the factors, in the header under any of its names, in a config beside the file, or nowhere."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from plait.cli import app
from plait.errors import InputError
from plait.formats.alpha import alpha_notes
from plait.formats.inspect import inspect
from plait.formats.reading import read_any
from plait.merging import merge_folders

LAYERS = [f"transformer_blocks.{i}.attn.{m}" for i in (0, 1) for m in ("to_q", "to_v")]
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["to_q", "to_v"], "use_rslora": False}


def factors(prefix: str, spelling: str = "lora_A", layers=LAYERS) -> dict[str, torch.Tensor]:
    a, b = {
        "lora_A": ("lora_A", "lora_B"),
        "lora_down": ("lora_down", "lora_up"),
        "lora.down": ("lora.down", "lora.up"),
    }[spelling]
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name in layers:
        found[f"{prefix}{name}.{a}.weight"] = torch.randn(4, 6, generator=generator)
        found[f"{prefix}{name}.{b}.weight"] = torch.randn(6, 4, generator=generator)
    return found


def header(prefix: str = "", **changed) -> dict[str, str]:
    config = {f"{prefix}{k}": v for k, v in {**CONFIG, **changed}.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config)}


PLACES = {
    "pipeline": ("transformer.", header("transformer.")),
    "one model's config": ("", header()),
    "one model's config, names of a pipeline": ("transformer.", header()),
    "another tool's names": ("diffusion_model.", header("transformer.")),
    "peft's names": ("base_model.model.", header()),
    "plain keys": ("", {"lora_alpha": "16", "r": "4"}),
    "namespaced keys": ("transformer.", {"transformer.lora_alpha": "16.0", "transformer.r": "4"}),
    "namespaced keys, another tool's names": ("diffusion_model.", {"transformer.lora_alpha": "16"}),
    "network_alpha": ("diffusion_model.", {"network_alpha": "16", "network_dim": "4"}),
    "two places that agree": ("transformer.", {**header("transformer."), "lora_alpha": "16"}),
}


@pytest.mark.parametrize("spelling", ["lora_A", "lora.down"])
@pytest.mark.parametrize("place", PLACES)
def test_the_header_is_read_wherever_it_says_alpha(tmp_path, place, spelling):
    prefix, metadata = PLACES[place]
    path = tmp_path / "a.safetensors"
    tensors = factors(prefix, spelling)
    save_file(tensors, path, metadata=metadata)
    adapter = read_any(path)
    assert {f.scaling for f in adapter.modules.values()} == {4.0}
    assert adapter.source["without_alpha"] == 0 and adapter.source["alpha_from"]
    assert "alpha comes from the header" in alpha_notes(adapter.source)[0]
    found = merge_folders([str(path)], tmp_path / "m.safetensors", "task_arithmetic", scale=1.0)
    assert found.record.adapters[0].facts["alpha_from"] == adapter.source["alpha_from"]
    written = load_file(tmp_path / "m.safetensors")
    for name, tensor in tensors.items():  # by hand: the scaling in B, none left
        wanted = tensor * 4 if name.endswith(("lora_B.weight", "up.weight")) else tensor
        assert torch.equal(written[name], wanted), name


def test_patterns_and_rslora_of_a_header_hold(tmp_path):
    tensors = factors("")
    metadata = header(use_rslora=True, alpha_pattern={"transformer_blocks.1.attn.to_v": 8})
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    scalings = {m: f.scaling for m, f in read_any(tmp_path / "a.safetensors").modules.items()}
    assert scalings.pop("transformer_blocks.1.attn.to_v") == 4.0  # 8 / sqrt(4)
    assert set(scalings.values()) == {8.0}  # 16 / sqrt(4)


def test_a_tensor_beside_the_factors_comes_first(tmp_path):
    tensors = {**factors("diffusion_model."), f"diffusion_model.{LAYERS[0]}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "a.safetensors", metadata=header("transformer."))
    scalings = {m: f.scaling for m, f in read_any(tmp_path / "a.safetensors").modules.items()}
    assert scalings.pop(f"diffusion_model.{LAYERS[0]}") == 0.5
    assert set(scalings.values()) == {4.0}


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_config_beside_the_file_answers_the_question(tmp_path, prefix):
    path = tmp_path / "step100.safetensors"
    save_file(factors(prefix), path)
    with pytest.raises(InputError, match="alpha is unknown") as caught:
        read_any(path)
    assert "adapter_config.json beside the file" in str(caught.value)
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 12}'
    )  # what the hint says
    assert {f.scaling for f in read_any(path).modules.values()} == {3.0}
    assert "unknown" not in (inspect(path).facts.problem or "")


def test_a_config_beside_is_not_asked_where_it_belongs_to_other_weights(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    save_file(factors("base_model.model."), tmp_path / "adapter_model.safetensors")
    save_file(factors("diffusion_model."), tmp_path / "other.safetensors")
    adapter = read_any(tmp_path / "other.safetensors")
    assert {f.scaling for f in adapter.modules.values()} == {1.0} and adapter.source["without_alpha"] == 4


@pytest.mark.parametrize(
    ("prefix", "metadata", "message"),
    [
        ("transformer.", header("transformer.", r=8), "promises rank 8"),
        ("", header(target_modules=["to_k"]), "config of other modules"),
        ("transformer.", {**header("transformer."), "transformer.lora_alpha": "8"}, r"4 by .* and 2 by"),
        ("", {"lora_alpha": "sixteen"}, "expected a number"),
        ("", {"lora_alpha": "-1"}, "expected a number"),
        ("", header("unet."), None),  # the only config and the only root: it is the file's
        ("weights.", {"unet.lora_alpha": "4", "text_encoder.lora_alpha": "8"}, "and the modules are called"),
    ],
)
def test_contradictions_are_errors(tmp_path, prefix, metadata, message):
    path = tmp_path / "a.safetensors"
    save_file(factors(prefix), path, metadata=metadata)
    if message is None:
        assert {f.scaling for f in read_any(path).modules.values()} == {4.0}
        return
    with pytest.raises(InputError, match=message):
        read_any(path)


@pytest.mark.parametrize(
    ("prefix", "spelling"), [("transformer.", "lora_A"), ("unet.", "lora.down"), ("diffusion_model.", "lora_down")]
)
def test_silence_means_the_rank_where_the_loaders_say_so_and_is_said(tmp_path, prefix, spelling):
    path, out = tmp_path / "a.safetensors", tmp_path / "m.safetensors"
    save_file(factors(prefix, spelling), path)
    assert {f.scaling for f in read_any(path).modules.values()} == {1.0}
    found = CliRunner().invoke(app, ["merge", str(path), "--out", str(out)])
    assert found.exit_code == 0 and "a: 4 modules came without an alpha" in found.output
    assert read_any(out).source["without_alpha"] == 0  # plait's own record says that 1 is meant
    assert "came without" in CliRunner().invoke(app, ["inspect", str(path)]).output


def test_kohyas_lost_alphas_are_told_by_its_header(tmp_path):
    tensors = {f"lora_unet_{n.replace('.', '_')}{s}": t for n, s, t in _kohya()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"ss_network_alpha": "1", "ss_network_dim": "4"})
    with pytest.raises(InputError, match="tells of alpha 1"):
        read_any(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors", metadata={"ss_network_alpha": "4.0"})
    assert {f.scaling for f in read_any(tmp_path / "b.safetensors").modules.values()} == {1.0}


def _kohya():
    for key, tensor in factors("", "lora_down").items():
        name, _, half = key.partition(".lora_")
        yield name, f".lora_{half}", tensor


@pytest.mark.parametrize("tasks", ["5", '"a"', "[1]", "{}"])
def test_a_record_whose_tasks_are_no_names(tmp_path, tasks):
    save_file(factors("unet."), tmp_path / "a.safetensors", metadata={"plait": f'{{"result": {{"tasks": {tasks}}}}}'})
    with pytest.raises(InputError, match="tasks"):
        read_any(tmp_path / "a.safetensors")
