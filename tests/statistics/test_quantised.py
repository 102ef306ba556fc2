"""A base in 4 bits, for real: bitsandbytes runs NF4 on the CPU too."""

from __future__ import annotations

import pytest
import torch

from plait.statistics import check_statistics, collect_statistics, merge_statistics, read_statistics, write_statistics
from plait.subspaces import stream_subspaces
from tests.statistics.models import batches, build, inputs_by_hand

pytest.importorskip("bitsandbytes")
# Where the CPU multiplies bfloat16, bitsandbytes packs weights anew: inputs in blocks of 64, outputs of 32.
SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    import transformers as hf

    folder = tmp_path_factory.mktemp("base")
    build("llama", **SIZES).save_pretrained(folder)
    config = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


@pytest.mark.filterwarnings("ignore")
def test_nf4_is_collected_and_labelled(quantised, tmp_path):
    given = batches("llama", 0, examples=12)
    found = collect_statistics(quantised, given, "all-linear", provenance={"base": "b", "base_sha256": "q"})
    plain = collect_statistics(
        build("llama", **SIZES), given, "all-linear", provenance={"base": "b", "base_sha256": "f"}
    )
    assert found.provenance["quantisation"] == "bitsandbytes-4bit" and found.provenance["dtype"] == "float32"
    assert {n: i.shape for n, i in found.modules.items()} == {n: i.shape for n, i in plain.modules.items()}
    layer = quantised.model.layers[1].mlp.down_proj
    seen = inputs_by_hand(quantised, layer, given)
    H = torch.cat([h[b["attention_mask"].bool()] for b, (h, _) in zip(given, seen, strict=True)])
    moments = found.moments_for("layers.1.mlp.down_proj")
    torch.testing.assert_close(moments.dense(), H.T @ H, rtol=1e-4, atol=1e-4)
    away = (moments.dense() - plain.moments_for("layers.1.mlp.down_proj").dense()).norm() / moments.dense().norm()
    assert 0.01 < away < 1  # four bits move the activations of a model this small
    write_statistics(tmp_path / "q", found)
    again = read_statistics(tmp_path / "q")
    assert any("bitsandbytes-4bit" in w for w in check_statistics(again).warnings)
    assert merge_statistics(again, plain).sites.keys() == plain.sites.keys()


@pytest.mark.filterwarnings("ignore")
def test_nf4_is_streamed(quantised):
    given = {t: batches("llama", i, examples=12) for i, t in enumerate("ab")}
    found = stream_subspaces("contrastive", quantised, given, "all-linear", rank=2)
    A = found.subspaces["a"]["layers.1.mlp.down_proj"].basis
    torch.testing.assert_close(A @ A.T, torch.eye(2), rtol=1e-5, atol=1e-5)
