"""Files of kohya and diffusers: read to the same update as their trainers apply, and back without a bit changed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.errors import InputError
from plait.formats.keys import DIFFUSERS, KOHYA
from plait.formats.reading import read_any
from plait.formats.single_file import read_lora_file, write_lora_file
from tests.formats.conftest import KOHYA_NAMES, MODULES, by_hand, dense_output, factors_of, input_of


def test_kohya_update_is_what_its_trainer_applies(kohya):
    adapter = read_lora_file(kohya("style"))
    assert adapter.name == "style"
    assert adapter.base == "sd_v1"
    assert set(adapter.modules) == set(KOHYA_NAMES.values())
    for module, (A, B, alpha) in factors_of(0).items():
        x = input_of(module)
        delta = adapter.modules[KOHYA_NAMES[module]].delta(torch.float64)
        wanted = by_hand(module, A.double(), B.double(), alpha / 3, x)
        torch.testing.assert_close(dense_output(module, delta, x), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kohya_comes_back_bit_by_bit(kohya, tmp_path, dtype):
    path = kohya("style", dtype=dtype, alpha=4.0)
    write_lora_file(tmp_path / "again.safetensors", read_lora_file(path), KOHYA)
    before, after = load_file(path), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key]), key


def diffusers_spelling(layout: str) -> dict[str, torch.Tensor]:
    """One update in the spellings that diffusers has had."""
    found = {}
    for module, (A, B, _) in factors_of(0).items():
        text, last = module.startswith("text_encoder"), module.rpartition(".")[2]
        a, b = {
            "today": (f"{module}.lora_A.weight", f"{module}.lora_B.weight"),
            "lora.down": (f"{module}.lora.down.weight", f"{module}.lora.up.weight"),
        }.get(layout, ("", ""))
        if layout == "lora.down" and text:
            a, b = f"{module}.lora_linear_layer.down.weight", f"{module}.lora_linear_layer.up.weight"
        if layout == "processor":
            old = module.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.")
            old = old.replace("to_out.0", "to_out").replace("q_proj", "to_q").replace("out_proj", "to_out")
            joint = "_lora" if last in ("to_q", "0", "q_proj", "out_proj") else ".lora"
            a, b = f"{old}{joint}.down.weight", f"{old}{joint}.up.weight"
        found |= {a: A, b: B}
    return found


@pytest.mark.parametrize("layout", ["today", "lora.down", "processor"])
def test_diffusers_spellings_are_one_update(tmp_path, layout):
    path = tmp_path / "style.safetensors"
    save_file(diffusers_spelling(layout), path)
    adapter = read_any(path)
    assert set(adapter.modules) == set(MODULES)
    for module, (A, B, _) in factors_of(0).items():
        f = adapter.modules[module]
        assert f.scaling == 1.0
        assert torch.equal(f.A, A.reshape(3, -1))
        assert torch.equal(f.B, B.reshape(-1, 3))
    write_lora_file(tmp_path / "again.safetensors", adapter, DIFFUSERS)
    again = load_file(tmp_path / "again.safetensors")
    if layout != "processor":  # obsolete, and written as today
        assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in load_file(path).items()}
    assert {m: f.A.tolist() for m, f in read_any(tmp_path / "again.safetensors").modules.items()} == {
        m: f.A.tolist() for m, f in adapter.modules.items()
    }


def test_alphas_in_diffusers_metadata_and_beside_the_factors(tmp_path):
    first = next(iter(MODULES))
    config = {"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {first.removeprefix("unet."): 12}}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    save_file(diffusers_spelling("today"), tmp_path / "a.safetensors", metadata=metadata)
    scalings = {m: f.scaling for m, f in read_any(tmp_path / "a.safetensors").modules.items()}
    assert scalings[first] == 4.0
    assert {s for m, s in scalings.items() if m.startswith("unet.") and m != first} == {2.0}
    assert {s for m, s in scalings.items() if m.startswith("text")} == {1.0}
    tensors = {**diffusers_spelling("today"), f"{first}.alpha": torch.tensor(6.0)}
    save_file(tensors, tmp_path / "b.safetensors")
    assert read_any(tmp_path / "b.safetensors").modules[first].scaling == 2.0


def test_without_alpha_it_is_the_rank(kohya):
    name = KOHYA_NAMES[next(iter(MODULES))]
    adapter = read_any(kohya("style", changed={f"{name}.alpha": None}))
    assert adapter.modules[name].scaling == 1.0
    assert adapter.source["without_alpha"] == 1


Q, CONV = (KOHYA_NAMES[m] for m in list(MODULES)[:5:4])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({f"{Q}.lora_down.weight": None}, "has no down"),
        ({f"{Q}.lora_up.weight": None}, "has no up"),
        ({f"{Q}.alpha": torch.tensor(float("nan"))}, "NaN"),
        ({f"{Q}.alpha": torch.tensor(float("inf"))}, "infinity"),
        ({f"{Q}.alpha": torch.tensor(0.0)}, "alpha is 0.0"),
        ({f"{Q}.alpha": torch.tensor(-4.0)}, "alpha is -4.0"),
        ({f"{Q}.alpha": torch.ones(3)}, r"a tensor \(3,\)"),
        ({"lora_unet_other.alpha": torch.tensor(1.0)}, "belongs to no module"),
        ({f"{Q}.lora_up.weight": torch.full((12, 3), torch.nan)}, "NaN"),
        ({f"{Q}.lora_up.weight": torch.ones(12, 4)}, "no rank in common"),
        ({f"{Q}.lora_up.weight": torch.ones(12, 3, 1, 1)}, "are no factors"),
        ({f"{CONV}.lora_up.weight": torch.ones(6, 3, 3, 3)}, "are no factors"),
        ({f"{Q}.lora_up.weight": torch.ones(12, 3, dtype=torch.int8)}, "is torch.int8"),
        ({f"{Q}.hada_w1_a": torch.ones(3, 3)}, "LoHa.*Hadamard|LoHa.*entrywise"),
        ({f"{Q}.lokr_w1": torch.ones(3, 3)}, "LoKr.*Kronecker"),
        ({f"{Q}.oft_blocks": torch.ones(3, 3)}, "OFT.*rotates"),
        ({f"{Q}.dora_scale": torch.ones(12, 1)}, "DoRA.*magnitude"),
        ({f"{CONV}.lora_mid.weight": torch.ones(3, 3, 3, 3)}, "no Tucker decomposition"),
        ({f"{Q}.lora_mid.weight": torch.ones(3, 3)}, "no Tucker decomposition"),
        ({"lora_unet_other.lora_mid.weight": torch.ones(3, 3, 3, 3)}, "has no (down|up)"),
        ({f"{Q}.diff_b": torch.ones(3)}, "full difference"),
        ({"unet.x.lora_A.weight": torch.ones(3, 3)}, "one format a file"),
        ({f"{Q}.something": torch.ones(3)}, "belongs to no LoRA"),
    ],
)
def test_bad_contents_are_named(kohya, changed, message):
    with pytest.raises(InputError, match=message) as raised:
        read_any(kohya("style", changed=changed))
    assert "style" in str(raised.value)
    assert raised.value.exit_code == 3


def test_damaged_files_are_named(kohya, tmp_path):
    path = kohya("style")
    data = path.read_bytes()
    for damage, message in ((data[:-40], "not a whole"), (b"", "header"), (b"\x80\x02" + data, "pickle")):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=message):
            read_any(path)
    (tmp_path / "old.ckpt").write_bytes(data)
    with pytest.raises(InputError, match=r"no \.safetensors"):
        read_any(tmp_path / "old.ckpt")
    path.write_bytes(data)
    save_file({"x.weight": torch.ones(2)}, path)
    with pytest.raises(InputError, match="no LoRA factors"):
        read_any(path)


def test_a_diffusion_model_is_no_full_difference(tmp_path):
    tensors = {f"model.diffusion_model.blocks.0.q.lora_{h}.weight": torch.ones(2, 2) for h in "AB"}
    save_file(tensors, tmp_path / "dit.safetensors")
    assert list(read_any(tmp_path / "dit.safetensors").modules) == ["model.diffusion_model.blocks.0.q"]


@pytest.mark.parametrize("record", ["{", "[1]", '{"result": 3}', '{"options": []}', "[" * 5000 + " " * 60_000])
def test_a_record_that_is_none(kohya, record):
    with pytest.raises(InputError, match="its metadata's 'plait'"):
        read_any(kohya("style", metadata={"plait": record}))


@pytest.mark.parametrize("record", ['{"result": null}', '{"options": null, "inputs": null, "result": null}', "{}"])
def test_a_record_in_the_metadata_may_hold_nothing(kohya, record):
    """Null stands for nothing there; an earlier reader looked for the base inside it."""
    read, bare = read_any(kohya("style", metadata={"plait": record})), read_any(kohya("bare"))
    assert set(read.modules) == set(bare.modules)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected an object"),
        ('{"unet.use_dora": true, "unet.r": 3}', "use_dora"),
        ('{"unet.lora_alpha": -1}', "lora_alpha is -1"),
    ],
)
def test_bad_configs_in_the_metadata(tmp_path, text, message):
    save_file(diffusers_spelling("today"), tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": text})
    with pytest.raises(InputError, match=message):
        read_any(tmp_path / "a.safetensors")
