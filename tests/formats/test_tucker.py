"""Tucker-decomposed convolutions: three layers one after another, read as the plain convolution LoRA that they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plait.adapters.conv import with_middle
from plait.errors import InputError
from plait.formats.convert import convert
from plait.formats.inspect import inspect
from plait.formats.reading import read_any
from plait.merging import merge_folders
from tests.formats.conftest import KOHYA_NAMES

CONV = "unet.down_blocks.0.resnets.0.conv1"
NAME, RANK = KOHYA_NAMES[CONV], 3


def tucker(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"down": (RANK, 5, 1, 1), "mid": (RANK, RANK, 3, 3), "up": (6, RANK, 1, 1)}
    return {f"{NAME}.lora_{k}.weight": torch.randn(s, generator=g).to(dtype) for k, s in shapes.items()}


def as_trained(tensors, x, scaling):
    """The layers as LyCORIS stacks them: down 1x1, the kernel in the middle, up 1x1."""
    down, mid, up = (tensors[f"{NAME}.lora_{k}.weight"].double() for k in ("down", "mid", "up"))
    return scaling * nn.functional.conv2d(nn.functional.conv2d(nn.functional.conv2d(x, down), mid, padding=1), up)


def applied(adapter, x):
    f = adapter.modules[NAME]
    return nn.functional.conv2d(x, f.delta(torch.float64).reshape(6, 5, 3, 3), padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_read_as_its_plain_lora(kohya, dtype):
    tensors = tucker(1, dtype)
    adapter = read_any(kohya("a", changed=tensors, dtype=dtype))
    x = torch.randn(2, 5, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f = adapter.modules[NAME]
    assert (f.rank, f.kind, adapter.source["tucker"]) == (RANK, "conv:3x3", 1)
    torch.testing.assert_close(applied(adapter, x), as_trained(tensors, x, 1.5 / RANK), rtol=1e-5, atol=1e-5)


def test_merged_and_converted(kohya, tmp_path):
    one, two = tucker(1), tucker(2)
    a, b = kohya("a", 0, changed=one), kohya("b", 1, changed=two)
    found = merge_folders([str(a), str(b)], tmp_path / "m.safetensors", "task_arithmetic", scale=1.0)
    assert found.record.verification_error < 1e-4
    x = torch.randn(1, 5, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    merged = applied(read_any(tmp_path / "m.safetensors"), x)
    torch.testing.assert_close(merged, as_trained(one, x, 0.5) + as_trained(two, x, 0.5), rtol=1e-5, atol=1e-4)
    done = convert(a, tmp_path / "p")
    assert any("Tucker" in note for note in done.record.notes)
    assert inspect(a).facts.variant == "LoRA with Tucker convolutions" and inspect(a).facts.problem is None


def test_shapes_of_no_tucker_decomposition():
    A, mid, B = torch.ones(3, 5, 1, 1), torch.ones(3, 3, 3, 3), torch.ones(6, 3, 1, 1)
    for a, m, b in ((A[..., 0, 0], mid, B), (A, mid[:2], B), (A.expand(3, 5, 3, 3), mid, B), (A, mid, B[..., 0])):
        with pytest.raises(InputError, match="no Tucker"):
            with_middle(a, m, b, "x")
