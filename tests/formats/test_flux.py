"""Flux's fused projections taken apart: the parts' outputs, one under another, are the fused layer's."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from plait.errors import InputError
from plait.formats.convert import convert
from plait.formats.fused import taken_apart
from plait.formats.layouts import FLUX
from plait.formats.reading import read_any
from plait.merging import merge_folders

WIDTH, MLP = 8, 32
SHAPES = {
    "double_blocks_3_img_attn_qkv": (3 * WIDTH, WIDTH),
    "double_blocks_3_txt_attn_proj": (WIDTH, WIDTH),
    "double_blocks_3_img_mlp_0": (MLP, WIDTH),
    "single_blocks_7_linear1": (3 * WIDTH + MLP, WIDTH),
    "single_blocks_7_linear2": (WIDTH, WIDTH + MLP),
}


@pytest.fixture
def flux(tmp_path):
    def make(name: str, seed: int, shapes=SHAPES):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for module, (out, width) in shapes.items():
            tensors[f"lora_unet_{module}.lora_down.weight"] = torch.randn(4, width, generator=generator)
            tensors[f"lora_unet_{module}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
            tensors[f"lora_unet_{module}.alpha"] = torch.tensor(2.0)
        tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(4, 5)
        tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.ones(6, 4)
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata={"ss_base_model_version": "flux1"})
        return tmp_path / f"{name}.safetensors"

    return make


def stacked(modules, *parts):
    return torch.cat([modules[f"transformer.{p}"].delta() for p in parts])


def test_parts_are_the_fused_layer(flux, tmp_path):
    fused = read_any(flux("a", 0)).modules
    convert(tmp_path / "a.safetensors", tmp_path / "d.safetensors", to="diffusers")
    apart = read_any(tmp_path / "d.safetensors").modules
    qkv = [f"transformer_blocks.3.attn.to_{x}" for x in "qkv"]
    one = [f"single_transformer_blocks.7.attn.to_{x}" for x in "qkv"] + ["single_transformer_blocks.7.proj_mlp"]
    assert torch.equal(stacked(apart, *qkv), fused["lora_unet_double_blocks_3_img_attn_qkv"].delta())
    assert torch.equal(stacked(apart, *one), fused["lora_unet_single_blocks_7_linear1"].delta())
    for name, module in (
        ("transformer_blocks.3.attn.to_add_out", "double_blocks_3_txt_attn_proj"),
        ("transformer_blocks.3.ff.net.0.proj", "double_blocks_3_img_mlp_0"),
        ("single_transformer_blocks.7.proj_out", "single_blocks_7_linear2"),
    ):
        assert torch.equal(apart[f"transformer.{name}"].delta(), fused[f"lora_unet_{module}"].delta())
    assert len(apart) == 11
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1" in apart


def test_merged_into_diffusers(flux, tmp_path):
    a, b = flux("a", 0), flux("b", 1)
    merge_folders([str(a), str(b)], tmp_path / "m.safetensors", "tsv", scale=1.0)
    found = merge_folders([str(a), str(b)], tmp_path / "d.safetensors", "tsv", format="diffusers", scale=1.0)
    assert found.record.verification_error < 1e-4
    fused = read_any(tmp_path / "m.safetensors").modules["lora_unet_double_blocks_3_img_attn_qkv"]
    apart = read_any(tmp_path / "d.safetensors").modules
    torch.testing.assert_close(stacked(apart, *(f"transformer_blocks.3.attn.to_{x}" for x in "qkv")), fused.delta())


def test_what_flux_has_not(flux):
    for module, shape, message in (
        ("double_blocks_0_img_attn_q", (8, 8), "is no layer of double_blocks"),
        ("single_blocks_0_linear1", (24, 8), "do not fill"),
        ("double_blocks_0_txt_attn_qkv", (25, 8), "do not fill"),
    ):
        with pytest.raises(InputError, match=message):
            taken_apart(read_any(flux("x", 0, {module: shape})).modules, FLUX)
