"""Names with dots are one thing however they are spelled: lora_down or lora_A, with ComfyUI's prefix or without."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from plait.cli import app
from plait.errors import InputError
from plait.formats.convert import convert
from plait.formats.inspect import inspect
from plait.formats.reading import read_any
from plait.merging import merge_folders

LAYERS = ("self_attn.q", "cross_attn.k_img", "ffn.0")
SPELLINGS = {
    "lora_A": ("lora_A", "lora_B"),
    "lora_down": ("lora_down", "lora_up"),
    "lora.down": ("lora.down", "lora.up"),
}


def written(path, seed, spelling="lora_A", prefix="diffusion_model.", alpha=None, **more):
    generator = torch.Generator().manual_seed(seed)
    a, b = SPELLINGS[spelling]
    tensors, deltas = {}, {}
    for i in (0, 1):
        for layer in LAYERS:
            name = f"{prefix}blocks.{i}.{layer}"
            A, B = torch.randn(4, 6, generator=generator), torch.randn(6, 4, generator=generator)
            tensors |= {f"{name}.{a}.weight": A, f"{name}.{b}.weight": B}
            tensors |= {f"{name}.alpha": torch.tensor(float(alpha))} if alpha else {}
            deltas[f"blocks.{i}.{layer}"] = (alpha or 4) / 4 * B.double() @ A.double()
    save_file({**tensors, **more}, path)
    return deltas


@pytest.mark.parametrize("second", SPELLINGS)
@pytest.mark.parametrize("first", SPELLINGS)
def test_spellings_merge(tmp_path, first, second):
    a, b, out = (tmp_path / f"{n}.safetensors" for n in "abo")
    one, two = written(a, 1, first, alpha=2), written(b, 2, second)
    found = merge_folders([str(a), str(b)], out, weights=[1.0, -0.5])
    assert found.record.format == "original" and found.record.rank == 8
    for module, f in read_any(out).modules.items():
        name = module.removeprefix("diffusion_model.")
        torch.testing.assert_close(f.delta(torch.float64), one[name] - 0.5 * two[name], atol=1e-6, rtol=1e-6)
    assert load_file(out).keys() == {k for k in load_file(a) if not k.endswith(".alpha")}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_prefixes_merge(tmp_path, prefix):
    a, b, out = (tmp_path / f"{n}.safetensors" for n in "abo")
    one, two = written(a, 1, alpha=2), written(b, 2, "lora_down", prefix, alpha=8)
    found = merge_folders([str(a), str(b)], out, "task_arithmetic", scale=1.0)
    assert found.record.rank == 8 and not found.record.missing
    for module, f in read_any(out).modules.items():
        name = module.removeprefix("diffusion_model.")
        torch.testing.assert_close(f.delta(torch.float64), one[name] + two[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_to_kohya_only_the_names_change(tmp_path, spelling):
    deltas = written(tmp_path / "a.safetensors", 1, spelling, alpha=2)
    convert(tmp_path / "a.safetensors", tmp_path / "k.safetensors", to="kohya")
    found = {m: f.delta(torch.float64) for m, f in read_any(tmp_path / "k.safetensors").modules.items()}
    assert found.keys() == {"lora_unet_" + m.replace(".", "_") for m in deltas}
    for module, delta in deltas.items():
        torch.testing.assert_close(found["lora_unet_" + module.replace(".", "_")], delta)


def test_the_hint_for_kohyas_flat_names_works(tmp_path):
    """The way that the error names is taken, and then the merge works."""
    a, b, out = (tmp_path / f"{n}.safetensors" for n in "abo")
    written(a, 1, alpha=2)
    convert(a, b, to="kohya")
    with pytest.raises(InputError, match="a kohya one") as refused:
        merge_folders([f"flat={b}", f"dotted={a}"], out, "task_arithmetic", scale=1.0)
    hint = str(refused.value.hint).split()[1:5]  # convert FILE --to kohya
    assert hint == ["convert", str(a), "--to", "kohya"]
    done = CliRunner().invoke(app, [*hint, "--out", str(tmp_path / "c.safetensors")])
    assert done.exit_code == 0, done.output
    merged = CliRunner().invoke(app, ["merge", f"flat={b}", f"dotted={tmp_path / 'c.safetensors'}", "--out", str(out)])
    assert merged.exit_code == 0, merged.output


@pytest.mark.parametrize("target", ["diffusers", "peft"])
def test_unknown_models_keep_their_names(tmp_path, target):
    written(tmp_path / "a.safetensors", 1, alpha=2)
    convert(tmp_path / "a.safetensors", tmp_path / "k.safetensors", to="kohya")
    for source in ("a", "k"):
        with pytest.raises(InputError, match=r"not known here|unknown here"):
            convert(tmp_path / f"{source}.safetensors", tmp_path / "d", to=target)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(6)}, "full difference"),
        ({"diffusion_model.blocks.0.norm.diff": torch.ones(6)}, "full difference"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_magnitude_vector": torch.ones(6)}, "DoRA"),
        ({"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(6)}, "DoRA"),
        ({"diffusion_model.blocks.0.norm.w_norm": torch.ones(6)}, "trained norms"),
    ],
)
@pytest.mark.parametrize("spelling", ["lora_A", "lora_down"])
def test_what_stands_beside_is_refused_by_name(tmp_path, spelling, more, named):
    written(tmp_path / "a.safetensors", 1, spelling, **more)
    with pytest.raises(InputError, match=named):
        read_any(tmp_path / "a.safetensors")
    assert named in inspect(tmp_path / "a.safetensors").facts.variant


def test_names_that_would_fall_together_are_refused(tmp_path):
    pair = {".lora_A.weight": torch.ones(2, 3), ".lora_B.weight": torch.ones(3, 2)}
    names = ("diffusion_model.blocks.0.a_b", "diffusion_model.blocks.0.a.b")
    save_file({n + s: t.clone() for n in names for s, t in pair.items()}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="are both"):
        convert(tmp_path / "a.safetensors", tmp_path / "k.safetensors", to="kohya")
