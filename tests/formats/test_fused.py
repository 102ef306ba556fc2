"""Flux and SD3: projections apart in diffusers and PEFT, fused in the original layout; there and back the same update."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from plait.adapters.lora import LoraFactors
from plait.cli import app
from plait.errors import InputError, UsageError
from plait.formats.convert import convert
from plait.formats.fused import put_together, taken_apart
from plait.formats.layouts import FLUX, SD3, layout_for, original_layout
from plait.formats.reading import read_any
from plait.merging import merge_folders

WIDTH, MLP = 8, 32
FLUX_SHAPES = {
    "double_blocks_3_img_attn_qkv": (3 * WIDTH, WIDTH),
    "double_blocks_3_txt_attn_qkv": (3 * WIDTH, WIDTH),
    "double_blocks_3_txt_attn_proj": (WIDTH, WIDTH),
    "double_blocks_3_img_mlp_0": (MLP, WIDTH),
    "double_blocks_3_img_mod_lin": (6 * WIDTH, WIDTH),
    "single_blocks_7_linear1": (3 * WIDTH + MLP, WIDTH),
    "single_blocks_7_linear2": (WIDTH, WIDTH + MLP),
    "time_in_in_layer": (WIDTH, 4),
    "final_layer_adaLN_modulation_1": (2 * WIDTH, WIDTH),
}
SD3_SHAPES = {
    "joint_blocks_0_x_block_attn_qkv": (3 * WIDTH, WIDTH),
    "joint_blocks_0_x_block_attn2_qkv": (3 * WIDTH, WIDTH),
    "joint_blocks_0_x_block_mlp_fc1": (MLP, WIDTH),
    "joint_blocks_0_context_block_attn_qkv": (3 * WIDTH, WIDTH),
    "joint_blocks_0_context_block_adaLN_modulation_1": (6 * WIDTH, WIDTH),
    "joint_blocks_23_context_block_adaLN_modulation_1": (2 * WIDTH, WIDTH),
    "joint_blocks_23_x_block_attn_proj": (WIDTH, WIDTH),
    "t_embedder_mlp_0": (WIDTH, 4),
    "final_layer_linear": (4, WIDTH),
}
T5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"


@pytest.fixture
def original(tmp_path):
    """original("a", SHAPES, base) -> a file in the original layout as kohya's scripts save it."""

    def make(name, shapes, base, seed=0):
        g = torch.Generator().manual_seed(seed)
        tensors = {}
        for module, (out, width) in shapes.items():
            tensors[f"lora_unet_{module}.lora_down.weight"] = torch.randn(4, width, generator=g)
            tensors[f"lora_unet_{module}.lora_up.weight"] = torch.randn(out, 4, generator=g)
            tensors[f"lora_unet_{module}.alpha"] = torch.tensor(2.0)
        for encoder in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", T5):
            tensors |= {f"{encoder}.lora_down.weight": torch.ones(4, 5), f"{encoder}.lora_up.weight": torch.ones(6, 4)}
            tensors[f"{encoder}.alpha"] = torch.tensor(4.0)
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata={"ss_base_model_version": base})
        return tmp_path / f"{name}.safetensors"

    return make


@pytest.mark.parametrize(
    ("shapes", "base", "encoder"),
    [(FLUX_SHAPES, "flux1", "text_encoder_2"), (SD3_SHAPES, "sd3-medium", "text_encoder_3")],
)
def test_there_and_back_bit_by_bit(original, tmp_path, shapes, base, encoder):
    source = original("a", shapes, base)
    convert(source, tmp_path / "p")
    assert (tmp_path / "p" / encoder).is_dir()
    done = convert(tmp_path / "p", tmp_path / "k.safetensors", to="kohya")
    first, second = load_file(source), load_file(tmp_path / "k.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any("original layout" in note for note in done.record.notes)


def test_sd3_parts_are_the_fused_layer(original, tmp_path):
    fused = read_any(original("a", SD3_SHAPES, "sd3")).modules
    convert(tmp_path / "a.safetensors", tmp_path / "d.safetensors", to="diffusers")
    apart = {m.removeprefix("transformer."): f.delta() for m, f in read_any(tmp_path / "d.safetensors").modules.items()}
    start = "lora_unet_joint_blocks_"
    for layer, parts in (
        ("x_block_attn_qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
        ("x_block_attn2_qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
        ("context_block_attn_qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        ("x_block_mlp_fc1", ("ff.net.0.proj",)),
        ("context_block_adaLN_modulation_1", ("norm1_context.linear",)),
    ):
        stacked = torch.cat([apart[f"transformer_blocks.0.{p}"] for p in parts])
        assert torch.equal(stacked, fused[f"{start}0_{layer}"].delta()), layer
    shift, scale = fused[f"{start}23_context_block_adaLN_modulation_1"].delta().chunk(2)
    assert torch.equal(apart["transformer_blocks.23.norm1_context.linear"], torch.cat([scale, shift]))
    assert torch.equal(apart["proj_out"], fused["lora_unet_final_layer_linear"].delta())


def factors(out, width, seed, rank=2, scaling=1.0):
    g = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(rank, width, generator=g), torch.randn(out, rank, generator=g), scaling)


BLOCK = "transformer.single_transformer_blocks.7"


@pytest.mark.parametrize("scalings", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.3)])
def test_parts_trained_apart_become_block_diagonal(scalings):
    parts = {
        p: factors(WIDTH, WIDTH, i, rank=i + 1, scaling=s) for i, (p, s) in enumerate(zip("qkv", scalings, strict=True))
    }
    mlp = factors(MLP, WIDTH, 9, scaling=scalings[0])
    modules = {f"{BLOCK}.attn.to_{p}": f for p, f in parts.items()} | {f"{BLOCK}.proj_mlp": mlp}
    fused, counts = put_together(modules, FLUX)
    found = fused["lora_unet_single_blocks_7_linear1"]
    expected = torch.cat([f.delta(torch.float64) for f in (*parts.values(), mlp)])
    torch.testing.assert_close(found.delta(torch.float64), expected, rtol=1e-6, atol=1e-6)
    assert (found.rank, counts) == (8, {"stacked": 1, "absent": 0})
    again = taken_apart(fused, FLUX)
    for m, f in modules.items():
        torch.testing.assert_close(again[m].delta(torch.float64), f.delta(torch.float64), rtol=1e-6, atol=1e-6)


def test_a_part_that_is_not_adapted_has_no_update():
    q, v = factors(WIDTH, WIDTH, 1), factors(WIDTH, WIDTH, 2)
    fused, counts = put_together({f"{BLOCK}.attn.to_q": q, f"{BLOCK}.attn.to_v": v}, FLUX)
    delta = fused["lora_unet_single_blocks_7_linear1"].delta()
    assert delta.shape == (3 * WIDTH + 4 * WIDTH, WIDTH) and counts == {"stacked": 1, "absent": 2}
    torch.testing.assert_close(delta[:WIDTH], q.delta())
    torch.testing.assert_close(delta[2 * WIDTH : 3 * WIDTH], v.delta())
    assert not delta[WIDTH : 2 * WIDTH].any() and not delta[3 * WIDTH :].any()


def test_peft_folder_of_flux_at_the_prompt(original, tmp_path):
    """By the base's name, by --layout against it, and refused where it is not that model's."""
    convert(original("a", FLUX_SHAPES, "black-forest-labs/FLUX.1-dev"), tmp_path / "p")
    component = tmp_path / "p" / "transformer"
    run = CliRunner()
    for options, name in (
        ([], "lora_unet_single_blocks_7_linear1"),
        (["--layout", "diffusers"], "lora_transformer_single_transformer_blocks_7_proj_mlp"),
    ):
        out = tmp_path / f"k{len(options)}.safetensors"
        found = run.invoke(
            app, ["convert", str(component), "--component", "transformer", "--to", "kohya", *options, "--out", str(out)]
        )
        assert found.exit_code == 0, found.output
        assert name in read_any(out).modules
    with pytest.raises(InputError, match="is none of sd3's"):
        convert(tmp_path / "p", tmp_path / "x.safetensors", to="kohya", layout="sd3")
    with pytest.raises(UsageError, match="from PEFT or diffusers to kohya"):
        convert(tmp_path / "p", tmp_path / "x.safetensors", to="diffusers", layout="flux")


def test_a_merge_of_diffusers_files_in_the_original_layout(original, tmp_path):
    for i, name in enumerate("ab"):
        convert(original(name, FLUX_SHAPES, "flux1", seed=i), tmp_path / f"{name}-peft")
        convert(tmp_path / f"{name}-peft", tmp_path / f"{name}-d.safetensors", to="diffusers")
    inputs = [str(tmp_path / f"{n}-d.safetensors") for n in "ab"]
    merge_folders(inputs, tmp_path / "m.safetensors", "task_arithmetic", format="kohya", scale=1.0)
    fused = [read_any(tmp_path / f"{n}.safetensors").modules for n in "ab"]
    merged = read_any(tmp_path / "m.safetensors").modules
    for module in ("lora_unet_single_blocks_7_linear1", "lora_unet_double_blocks_3_img_attn_qkv"):
        torch.testing.assert_close(merged[module].delta(), sum(f[module].delta() for f in fused), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("base", "layout"),
    [("black-forest-labs/FLUX.1-dev", FLUX), ("flux1", FLUX), ("flux-1/lora", FLUX), ("black-forest-labs/FLUX.2-dev", None),
     ("stabilityai/stable-diffusion-3.5-large", SD3), ("sd3-medium", SD3), ("sd_v1", None), ("sdxl_base_v1-0", None), ("", None)],
)  # fmt: skip
def test_layouts_by_the_base(base, layout):
    assert layout_for(base) is layout
    assert layout_for(base, "diffusers") is None and layout_for(base, "sd3") is SD3


def test_what_a_layout_has_not():
    for module, f, message in (
        ("transformer.transformer_blocks.0.attn.to_q", factors(WIDTH, 4, 0), r"as a part of .* would be \(4, 4\)"),
        ("transformer.mystery", factors(WIDTH, WIDTH, 0), "is none of flux's"),
        ("transformer.transformer_blocks.0.attn2.to_q", factors(WIDTH, WIDTH, 0), "is none of flux's"),
    ):
        with pytest.raises(InputError, match=message):
            put_together({module: f}, FLUX)
    with pytest.raises(UsageError, match="unknown layout 'fluks'"):
        layout_for("", "fluks")
    assert original_layout(["lora_transformer_x", "lora_te1_y"]) is None
    with pytest.raises(InputError, match="no module of flux"):
        taken_apart(
            {"lora_unet_double_blocks_0_img_mod_lin": factors(8, 8, 0), "lora_unet_conv_in": factors(8, 8, 1)}, FLUX
        )
