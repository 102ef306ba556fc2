"""Shared cases that always gave what is right: they still do, recomputed from the files or by PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cases.conftest import deltas, far, loaded, logits

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*embedding.*", "ignore:.*tie.*", "ignore:.*config file.*", "ignore:Adapter 'default'"
)


def of_file(path: str) -> dict[str, torch.Tensor]:
    """Module -> update in float64, of a kohya or diffusers file: alpha / rank, or 1 where there is none."""
    tensors, found = load_file(path), {}
    for a, b in ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")):
        for key in [k for k in tensors if k.endswith(a)]:
            module = key.removesuffix(a)
            A, B = tensors[key].double(), tensors[module + b].double()
            alpha = tensors.get(f"{module}.alpha")
            found[module] = (float(alpha) / A.shape[0] if alpha is not None else 1.0) * B.flatten(1) @ A.flatten(1)
    return found


def test_multihead_attention(case, plait):
    case("14_multihead_attention")
    assert plait("merge in/a in/b --out m")[0] == 0
    a, b, found = (deltas(Path(f)) for f in ("in/a", "in/b", "m"))
    for module, delta in found.items():
        wanted = a.get(module, 0) + b.get(module, 0)
        assert float((delta - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("keep", 1e-3)])  # some are float16, which is kept
@pytest.mark.parametrize(
    ("name", "files", "weights"),
    [
        ("18_mixed_ranks_no_alpha", ["turbo", "style"], [1.0, 1.0]),
        ("19_different_dims_kohya", ["dim32", "dim8", "blocks", "text_only"], [1.0, 0.5, -0.7, 1.0]),
    ],
)
def test_files_of_different_ranks(name, files, weights, dtype, error, case, plait):
    case(name)
    named = " ".join(f"in/{f}.safetensors" for f in files)
    code, _, err = plait(f"merge {named} --weights {','.join(map(str, weights))} --dtype {dtype} --out m.safetensors")
    assert code == 0, err
    inputs, found = [of_file(f"in/{f}.safetensors") for f in files], of_file("m.safetensors")
    assert found.keys() == {m for one in inputs for m in one}
    for module, delta in found.items():
        wanted = sum(w * one[module] for w, one in zip(weights, inputs, strict=True) if module in one)
        assert float((delta - wanted).norm() / wanted.norm()) < error


@pytest.mark.parametrize("name", ["head", "both"])
def test_an_output_layer_tied_to_the_embedding(name, case, plait):
    from transformers import AutoModelForCausalLM

    case("23_lm_head_tied_bake")
    base = AutoModelForCausalLM.from_pretrained("in/base").eval()
    wanted, zero = torch.load("in/logits.pt")[name], logits(base)
    assert plait(f"merge in/{name} --bake in/base --out b")[0] == 0 and plait(f"merge in/{name} --out m")[0] == 0
    assert far(logits(AutoModelForCausalLM.from_pretrained("b").eval()), wanted, zero) < 1e-5
    assert far(logits(loaded("m", base)), wanted, zero) < 1e-5
