"""PEFT's own convolution LoRAs: read, merged, converted from DoRA and baked as what PEFT makes of them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from plait.adapters.peft_format import read_adapter
from plait.formats.convert import convert
from plait.formats.plain import Means
from plait.merging import MergeRequest, MergeSpec, answer, merge_folders


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.point = nn.Conv2d(6, 5, 1)
        self.out = nn.Linear(5, 4)

    def forward(self, x):
        return self.out(self.point(torch.relu(self.conv(x))).mean((2, 3)))


def trained(folder, base: Net, seed: int, **options) -> dict[str, torch.Tensor]:
    """Saves an adapter of the net; returns the net's weights with it merged in, by PEFT."""
    import peft

    net = Net()
    net.load_state_dict(base.state_dict())
    wrapped = peft.get_peft_model(
        net, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["conv", "point", "out"], **options)
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload().state_dict()


@pytest.fixture
def base(tmp_path) -> Net:
    torch.manual_seed(0)
    net = Net()
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "net"}))
    return net


def applied(folder, base: Net) -> dict[str, torch.Tensor]:
    state = {k: v.clone() for k, v in base.state_dict().items()}
    for module, f in read_adapter(folder).modules.items():
        state[f"{module}.weight"] += f.delta().reshape(state[f"{module}.weight"].shape)
    return state


def close(found, wanted):
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5)


def test_sum_and_bake(base, tmp_path):
    one, two = (trained(tmp_path / n, base, seed) for seed, n in enumerate("ab"))
    close(applied(tmp_path / "a", base), one)
    wanted = {k: one[k] + two[k] - v for k, v in base.state_dict().items()}
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    merge_folders(folders, tmp_path / "sum", "task_arithmetic", scale=1.0)
    close(applied(tmp_path / "sum", base), wanted)
    answer(
        MergeRequest(folders, tmp_path / "full", MergeSpec("task_arithmetic", scale=1.0), bake_into=tmp_path / "base")
    )
    baked = load_file(tmp_path / "full" / "model.safetensors")
    assert baked["conv.weight"].shape == (6, 3, 3, 3)
    close(baked, wanted)


def test_the_written_merge_loads_in_peft(base, tmp_path):
    import peft

    trained(tmp_path / "a", base, 0)
    merge_folders([str(tmp_path / "a")], tmp_path / "m", "task_arithmetic", scale=2.0)
    wanted = applied(tmp_path / "m", base)
    net = Net()
    net.load_state_dict(base.state_dict())
    close(peft.PeftModel.from_pretrained(net, tmp_path / "m").merge_and_unload().state_dict(), wanted)


def test_dora_convolutions_at_full_rank(base, tmp_path):
    wanted = trained(tmp_path / "d", base, 0, use_dora=True)
    found = convert(tmp_path / "d", tmp_path / "plain", means=Means(base=tmp_path / "base", rank=32))
    assert found.record.conversions[0].exact
    close(applied(tmp_path / "plain", base), wanted)
