"""mlx-lm's adapters: its arithmetic is y + scale (x lora_a) lora_b, and a folder that plait wrote is one that it loads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.peft_format import read_adapter
from plait.advice.advise import advise
from plait.errors import InputError, UsageError
from plait.formats.convert import convert
from plait.formats.inspect import inspect
from plait.formats.reading import read_any
from plait.merging import merge_folders

KEYS = {"self_attn.q_proj": (12, 8), "self_attn.v_proj": (6, 8)}


def written(
    folder, seed, *, rank=4, scale=20.0, dtype=torch.float32, layers=(2, 3), changed=None, more=None, **parameters
):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        for key, (out, width) in KEYS.items():
            name = f"model.layers.{layer}.{key}"
            tensors[f"{name}.lora_a"] = torch.randn(width, rank, generator=generator).to(dtype)
            tensors[f"{name}.lora_b"] = torch.randn(rank, out, generator=generator).to(dtype)
    folder.mkdir(parents=True)
    save_file({k: v for k, v in {**tensors, **(more or {})}.items() if v is not None}, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "model": "org/base", "num_layers": 2, "iters": 100}
    config["lora_parameters"] = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(KEYS), **parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config | (changed or {})))
    return tensors


def added(tensors, name, scale, x):
    """What mlx-lm's layer adds to its output."""
    return scale * (x @ tensors[f"{name}.lora_a"].double()) @ tensors[f"{name}.lora_b"].double()


def names(tensors):
    return [k.removesuffix(".lora_a") for k in tensors if k.endswith(".lora_a")]


@pytest.mark.parametrize("scale", [20.0, 0.3, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_update_is_what_mlx_lm_adds(tmp_path, scale, dtype):
    tensors = written(tmp_path / "fr", 1, scale=scale, dtype=dtype)
    found = convert(tmp_path / "fr", tmp_path / "peft")
    assert found.record.origin == "mlx" and found.record.base == "org/base"
    adapter = read_adapter(tmp_path / "peft")
    assert set(adapter.modules) == set(names(tensors))
    for name in names(tensors):
        x = torch.randn(3, KEYS[name.split(".", 3)[3]][1], dtype=torch.float64)
        f = adapter.modules[name]
        mine = f.scaling * x @ f.A.double().T @ f.B.double().T
        torch.testing.assert_close(mine, added(tensors, name, scale, x), rtol=1e-6, atol=1e-6)


def test_there_and_back(tmp_path):
    tensors = written(tmp_path / "fr", 1)
    convert(tmp_path / "fr", tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    back = load_file(tmp_path / "mlx" / "adapters.safetensors")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], v) for k, v in tensors.items())
    assert config["lora_parameters"]["scale"] == 20.0 and config["lora_parameters"]["rank"] == 4
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == -1
    # mlx-lm wraps every module whose whole name is a key, at this rank, and then demands these very shapes
    assert config["lora_parameters"]["keys"] == sorted(names(tensors))


def test_several_ranks_and_scalings_of_a_peft_folder(tmp_path):
    """mlx-lm has one rank and one scale: zeros pad, B takes the scaling."""
    generator = torch.Generator().manual_seed(5)
    ranks = {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.self_attn.v_proj": 5}
    tensors = {}
    for name, rank in ranks.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 8, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(6, rank, generator=generator)
    (tmp_path / "p").mkdir()
    save_file(tensors, tmp_path / "p" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "rank_pattern": {"v_proj": 5},
        "alpha_pattern": {"v_proj": 4},
    }
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": "b", "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(config))
    found = convert(tmp_path / "p", tmp_path / "m", to="mlx")
    assert found.record.folded == 2 and found.record.verification_error < 1e-6
    mlx = load_file(tmp_path / "m" / "adapters.safetensors")
    about = json.loads((tmp_path / "m" / "adapter_config.json").read_text())["lora_parameters"]
    assert about["rank"] == 5 and about["scale"] == 1.0
    for name, alpha in zip(ranks, (6 / 2, 4 / 5), strict=True):
        assert mlx[f"{name}.lora_a"].shape == (8, 5) and mlx[f"{name}.lora_b"].shape == (5, 6)
        x = torch.randn(3, 8, dtype=torch.float64)
        A, B = (tensors[f"base_model.model.{name}.lora_{h}.weight"].double() for h in "AB")
        torch.testing.assert_close(added(mlx, name, 1.0, x), alpha * x @ A.T @ B.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", [None, "peft"])
def test_merges(tmp_path, format):
    one, two = written(tmp_path / "fr", 1), written(tmp_path / "de", 2, rank=3, scale=2.0, layers=(1, 2))
    places = [str(tmp_path / "fr"), str(tmp_path / "de" / "adapters.safetensors")]
    found = merge_folders(places, tmp_path / "m", weights=[0.5, -1.0], format=format)
    assert (
        found.record.format == (format or "mlx")
        and found.record.verification_error < 1e-6
        and found.record.tasks == ("fr", "de")
    )
    assert (tmp_path / "m" / ("adapters.safetensors" if format is None else "adapter_model.safetensors")).is_file()
    for name, f in read_any(tmp_path / "m").modules.items():
        x = torch.randn(3, f.shape[1], dtype=torch.float64)
        wanted = torch.zeros(3, f.shape[0], dtype=torch.float64)
        wanted += 0.5 * added(one, name, 20.0, x) if f"{name}.lora_a" in one else 0
        wanted -= added(two, name, 2.0, x) if f"{name}.lora_a" in two else 0
        torch.testing.assert_close(x @ f.delta(torch.float64).T, wanted, rtol=1e-5, atol=1e-5)


def test_a_merge_takes_the_method_and_scale_that_peft_folders_of_the_same_adapters_take(tmp_path):
    for name, seed in (("fr", 1), ("de", 2)):
        written(tmp_path / name, seed)
        convert(tmp_path / name, tmp_path / "peft" / name, to="peft")
    mlx = merge_folders([str(tmp_path / n) for n in ("fr", "de")], tmp_path / "m").record
    peft = merge_folders([str(tmp_path / "peft" / n) for n in ("fr", "de")], tmp_path / "p").record
    assert (mlx.method, mlx.scale, mlx.scale_reason) == (peft.method, peft.scale, peft.scale_reason)
    assert mlx.method == "tsv" and mlx.method_reason == peft.method_reason
    advice = advise([read_any(tmp_path / n) for n in ("fr", "de")])
    assert not any("pictures" in text for text in (advice.advice, *advice.unknown))
    wanted = read_any(tmp_path / "p").modules
    for name, f in read_any(tmp_path / "m").modules.items():
        torch.testing.assert_close(f.delta(), wanted[name].delta(), rtol=1e-5, atol=1e-5)


M = "model.layers.2.self_attn.q_proj"
REFUSED = [
    ({"changed": {"fine_tune_type": "dora"}}, "dora"),
    ({"changed": {"fine_tune_type": "full"}}, "full"),
    ({"changed": {"fine_tune_type": "other"}}, "fine_tune_type"),
    ({"more": {f"{M}.m": torch.ones(12)}}, "DoRA"),
    ({"more": {f"{M}.bias": torch.ones(12)}}, "no half"),
    ({"more": {f"{M}.lora_b": None}}, "has no lora_b"),
    ({"more": {f"{M}.lora_a": torch.ones(8, 5)}}, "disagree"),
    ({"more": {f"{M}.lora_a": torch.full((8, 4), torch.nan)}}, "expected finite"),
    ({"more": {"model.layers.0.mlp.up_proj.lora_a": torch.ones(4, 4, 8)}}, "experts"),
    ({"more": {"model.embed_tokens.lora_a": torch.ones(9, 4), "model.embed_tokens.lora_b": torch.ones(4, 8)},
      "keys": [*KEYS, "model.embed_tokens"]}, "embedding"),
    ({"alpha": 16}, "alpha"),
    ({"scale": "20"}, "scale"),
    ({"keys": ["self_attn.o_proj"]}, "none of the config's keys"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path, changes, message):
    written(tmp_path / "a", 1, **changes)
    with pytest.raises(InputError, match=message):
        read_any(tmp_path / "a")
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "a", tmp_path / "out")
    assert message in inspect(tmp_path / "a").facts.problem


def test_inspect_knows_it(tmp_path):
    written(tmp_path / "a", 1)
    for place in (tmp_path / "a", tmp_path / "a" / "adapters.safetensors"):
        found = inspect(place)
        assert (found.facts.format, found.facts.variant, found.facts.base) == ("mlx", "LoRA", "org/base")
        assert found.facts.figures.ranks == {"4": 4} and found.facts.problem is None


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_image_formats_are_refused(tmp_path, to):
    written(tmp_path / "a", 1)
    with pytest.raises((InputError, UsageError)):
        convert(tmp_path / "a", tmp_path / "o.safetensors", to=to)
