"""Names there and back: every module of three models, and what must not be guessed."""

from __future__ import annotations

import pytest

from plait.errors import InputError
from plait.formats.names import diffusers_names, kohya_names, to_diffusers, to_kohya
from tests.formats.conftest import KOHYA_NAMES, MODULES

# As kohya's SDXL files have them, and as diffusers does.
SDXL = {
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q": "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
    "lora_unet_input_blocks_8_1_proj_in": "unet.down_blocks.2.attentions.1.proj_in",
    "lora_unet_input_blocks_1_0_in_layers_2": "unet.down_blocks.0.resnets.0.conv1",
    "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_input_blocks_4_0_skip_connection": "unet.down_blocks.1.resnets.0.conv_shortcut",
    "lora_unet_middle_block_0_out_layers_3": "unet.mid_block.resnets.0.conv2",
    "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
    "lora_unet_middle_block_2_emb_layers_1": "unet.mid_block.resnets.1.time_emb_proj",
    "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_output_blocks_4_1_transformer_blocks_0_attn2_to_out_0": "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0",
    "lora_unet_label_emb_0_0": "unet.add_embedding.linear_1",
    "lora_unet_input_blocks_0_0": "unet.conv_in",
    "lora_te1_text_model_encoder_layers_0_self_attn_k_proj": "text_encoder.text_model.encoder.layers.0.self_attn.k_proj",
    "lora_te2_text_model_encoder_layers_31_mlp_fc2": "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
    "lora_te2_text_projection": "text_encoder_2.text_projection",
}  # fmt: skip


def test_stable_diffusion_there_and_back():
    assert diffusers_names(KOHYA_NAMES.values()) == {k: d for d, k in KOHYA_NAMES.items()}
    assert kohya_names(MODULES) == KOHYA_NAMES


def test_sdxl_there_and_back():
    assert diffusers_names(SDXL) == SDXL
    assert kohya_names(SDXL.values()) == {d: k for k, d in SDXL.items()}


def test_transformers():
    dotted = "transformer.single_transformer_blocks.7.attn.add_k_proj"
    assert to_diffusers("lora_transformer_single_transformer_blocks_7_attn_add_k_proj") == dotted
    assert to_diffusers("lora_te3_encoder_block_3_layer_1_DenseReluDense_wi_0") == (
        "text_encoder_3.encoder.block.3.layer.1.DenseReluDense.wi_0"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "does not start with a word"),
        ("lora_unet_down_blocks_0_mystery_to_q", "'mystery_to_q'"),
        ("lora_unet_input_blocks_4_0_mystery", "no layer of a residual block"),
        ("something_else", "starts with none of"),
    ],
)
def test_unknown_kohya_names_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        to_diffusers(name)


@pytest.mark.parametrize("name", ["vae.conv_in", "unet.my_own.thing"])
def test_unknown_diffusers_names_are_refused(name):
    with pytest.raises(InputError):
        to_kohya(name, several=False, first_release=False)


def test_two_names_of_one_module_are_refused():
    with pytest.raises(InputError, match="are both"):
        diffusers_names(["lora_te_text_projection", "lora_te1_text_projection"])
