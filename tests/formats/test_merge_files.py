"""Merging LoRA files: the merged file does to a layer what the methods promise, in the inputs' format or another."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plait.adapters.peft_format import read_adapter, write_adapter
from plait.errors import InputError, UsageError
from plait.formats.reading import read_any
from plait.merging import MergeRequest, MergeSpec, answer, merge, merge_folders
from tests.formats.conftest import KOHYA_NAMES, MODULES, by_hand, dense_output, factors_of, input_of


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_merged_file_does_the_sum_of_both(kohya, tmp_path, format):
    a, b = kohya("a", 1), kohya("b", 2, alpha=6.0)
    out = tmp_path / "merged.safetensors"
    request = MergeRequest([str(a), str(b)], out, MergeSpec(weights=[1.0, -0.5], scale=0.7), format=format)
    found = answer(request)
    assert found.record.format == format
    assert found.record.verification_error < 1e-5
    merged = read_any(out)
    assert merged.base == ("sd_v1")
    for module in MODULES:
        x = input_of(module)
        parts = [(factors_of(1)[module], 0.7), (factors_of(2, alpha=6.0)[module], -0.35)]
        wanted = sum(w * by_hand(module, A.double(), B.double(), alpha / 3, x) for (A, B, alpha), w in parts)
        name = KOHYA_NAMES[module] if format == "kohya" else module
        found_output = dense_output(module, merged.modules[name].delta(torch.float64), x)
        torch.testing.assert_close(found_output, wanted, rtol=1e-4, atol=1e-4)
    assert answer(request).reused


def test_kernels_are_written_as_they_came(kohya, tmp_path):
    merge_folders([str(kohya("a", 1)), str(kohya("b", 2))], tmp_path / "m.safetensors", "task_arithmetic", scale=1.0)
    stored = load_file(tmp_path / "m.safetensors")
    for module, (out, width, kernel) in MODULES.items():
        name = KOHYA_NAMES[module]
        assert stored[f"{name}.lora_down.weight"].shape == (6, width, *kernel)
        assert stored[f"{name}.lora_up.weight"].shape == (out, 6, *(1 for _ in kernel))
        assert stored[f"{name}.alpha"] == 6.0


@pytest.mark.parametrize("method", ["tsv", "ties", "iso_c", "knots", "svd", "dare_linear"])
def test_data_free_methods_see_convolutions_as_matrices(kohya, tmp_path, method):
    paths = [kohya("a", 1), kohya("b", 2)]
    found = merge_folders([str(p) for p in paths], tmp_path / "m.safetensors", method, scale=1.0)
    merged = read_any(tmp_path / "m.safetensors")
    twin = merge([read_any(p) for p in paths], method, scale=1.0).adapter
    for module, factors in twin.modules.items():
        torch.testing.assert_close(merged.modules[module].delta(), factors.delta(), rtol=1e-4, atol=1e-5)
    assert found.record.verification_error < 1e-3


def test_into_peft_folders_by_component(kohya, tmp_path):
    merge_folders([str(kohya("a", 1))], tmp_path / "out", "task_arithmetic", format="peft", scale=1.0)
    unet = read_adapter(tmp_path / "out" / "unet")
    assert unet.modules["down_blocks.0.resnets.0.conv1"].kind == "conv:3x3"
    with safe_open(tmp_path / "out" / "unet" / "adapter_model.safetensors", "pt") as f:
        key = "base_model.model.down_blocks.0.resnets.0.conv1.lora_A.weight"
        assert torch.equal(f.get_tensor(key), factors_of(1)["unet.down_blocks.0.resnets.0.conv1"][0])
    assert set(read_adapter(tmp_path / "out" / "text_encoder").modules) == {
        m.removeprefix("text_encoder.") for m in MODULES if m.startswith("text")
    }


def diffusers_file(path, seed):
    tensors = {}
    for module, (A, B, _) in factors_of(seed).items():
        tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    save_file(tensors, path)
    return str(path)


def test_what_does_not_go_together(kohya, tmp_path):
    a, out = str(kohya("a", 1)), tmp_path / "m.safetensors"
    with pytest.raises(InputError, match="a kohya adapter and 'd' a diffusers one"):
        merge_folders([a, diffusers_file(tmp_path / "d.safetensors", 2)], out, "task_arithmetic", scale=1.0)
    with pytest.raises(InputError, match="trained on 'sd_v1' and 'x' on 'sdxl'"):
        merge_folders(
            [a, str(kohya("x", metadata={"ss_base_model_version": "sdxl"}))], out, "task_arithmetic", scale=1.0
        )
    conv = KOHYA_NAMES["unet.mid_block.resnets.1.conv_shortcut"]
    other = {f"{conv}.lora_down.weight": torch.ones(3, 5), f"{conv}.lora_up.weight": torch.ones(6, 3)}
    with pytest.raises(InputError, match=r"conv:1x1 \(6, 5\) in 'a' and linear \(6, 5\) in 'k'"):
        merge_folders([a, str(kohya("k", changed=other))], out, "task_arithmetic", scale=1.0)
    with pytest.raises(UsageError, match=r"kohya is written as a \.safetensors file"):
        merge_folders([a], tmp_path / "folder", "task_arithmetic", scale=1.0)
    with pytest.raises(UsageError, match="unknown format"):
        merge_folders([a], out, "task_arithmetic", format="ckpt", scale=1.0)
    assert not out.exists()


def test_an_unknown_base_goes_with_any(kohya, tmp_path):
    nameless = kohya("n", 2, metadata={})
    found = merge_folders([str(nameless), str(kohya("a", 1))], tmp_path / "m.safetensors", "task_arithmetic", scale=1.0)
    assert found.record.base == "sd_v1"
    assert [a.base for a in found.record.adapters] == ["", "sd_v1"]


def test_other_settings_at_the_same_place(kohya, tmp_path):
    paths, out = [str(kohya("a", 1)), str(kohya("b", 2))], tmp_path / "m.safetensors"
    merge_folders(paths, out, "task_arithmetic", scale=1.0)
    before = out.read_bytes()
    with pytest.raises(UsageError, match=r"options.scale: 1.0 -> 0.5"):
        merge_folders(paths, out, "task_arithmetic", scale=0.5)
    assert out.read_bytes() == before
    merge_folders(paths, out, "task_arithmetic", scale=0.5, overwrite=True)
    with pytest.raises(UsageError, match="not written by plait"):
        merge_folders(paths[:1], kohya("z", 3), "task_arithmetic", scale=1.0)


def test_from_python_too(kohya, tmp_path):
    paths = [kohya("a", 1), kohya("b", 2)]
    assert merge_folders(paths, tmp_path / "m.safetensors", method="ties", scale=1.0).record.format == "kohya"
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="not as PEFT does"):
        write_adapter(tmp_path / "folder", read_any(paths[0]))
    with pytest.raises(UsageError, match="--per-task writes PEFT folders"):
        answer(MergeRequest([str(p) for p in paths], tmp_path / "x", MergeSpec("emr"), per_task=True))


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_auto_without_texts_keeps_the_format(kohya, tmp_path, format):
    from plait.choosing.auto_folders import merge_auto_folders

    paths = [str(kohya("a", 1)), str(kohya("b", 2))]
    if format == "diffusers":
        paths = [diffusers_file(tmp_path / f"d{seed}.safetensors", seed) for seed in (1, 2)]
    out = tmp_path / "chosen.safetensors"
    found = merge_auto_folders(paths, out)
    assert found.record.verification_error < 1e-3
    assert read_any(out).source["format"] == format
    assert set(read_any(out).modules) == set(KOHYA_NAMES.values() if format == "kohya" else MODULES)
    assert merge_auto_folders(paths, out).reused
