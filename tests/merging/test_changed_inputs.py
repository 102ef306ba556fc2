"""What an adapter means is more than its weights: a config or a file beside them that was edited makes another input of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.peft_format import CONFIG, read_adapter
from plait.cli import main
from plait.formats.reading import read_any


def foreign(folder: Path, seed: int) -> Path:
    """A folder that somebody else's PEFT has written: no manifest."""
    torch.manual_seed(seed)
    folder.mkdir()
    stem = "base_model.model.m.q_proj"
    save_file(
        {f"{stem}.lora_A.weight": torch.randn(4, 16), f"{stem}.lora_B.weight": torch.randn(12, 4)},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def run(*command: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as e:
        main([*command])
    return int(e.value.code or 0)


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return foreign(tmp_path / "a", 0), foreign(tmp_path / "b", 1)


@pytest.mark.parametrize("change", [{"lora_alpha": 16}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 2}}])
@pytest.mark.parametrize("method", ["cat", "tsv"])
def test_a_merge_of_an_edited_config_is_not_there_already(pair, capsys, change, method):
    command = ["merge", "a", "b", "--out", "m", "--method", method]
    assert run(*command) == 0
    assert run(*command) == 0 and "was there already" in capsys.readouterr().out
    edit(pair[0] / CONFIG, **change)
    assert run(*command) == 2
    assert "exists with other settings" in capsys.readouterr().err
    assert run(*command, "--overwrite") == 0
    expected = sum(read_adapter(p).modules["m.q_proj"].delta() for p in pair)
    if method == "cat":
        torch.testing.assert_close(read_adapter(Path("m")).modules["m.q_proj"].delta(), expected)


@pytest.mark.parametrize(
    "command", [["convert", "a", "--to", "mlx", "--out", "c"], ["export", "a", "--for", "peft", "--out", "c"]]
)
def test_what_else_is_made_of_an_edited_config_is_not_there_already(pair, capsys, command):
    assert run(*command) == 0 and run(*command) == 0
    edit(pair[0] / CONFIG, lora_alpha=16)
    assert run(*command) == 2
    assert "exists with other settings" in capsys.readouterr().err


def test_edit_tells_that_an_input_was_scaled_anew(pair, capsys):
    assert run("merge", "a", "b", "--out", "m", "--method", "cat") == 0
    edit(pair[0] / CONFIG, lora_alpha=16)
    assert run("edit", "m", "--weight", "a=0.5", "--out", "e") != 0
    assert "has changed since" in capsys.readouterr().err


def test_mlx_is_its_config_too(pair):
    assert run("convert", "a", "--to", "mlx", "--out", "c") == 0
    before, config = read_any(Path("c")), Path("c") / CONFIG
    shutil.copytree("c", "d")
    (Path("d") / "plait.json").unlink()  # as its trainer writes it
    parameters = json.loads(config.read_text())["lora_parameters"]
    edit(Path("d") / CONFIG, lora_parameters={**parameters, "scale": 2 * parameters["scale"]})
    after = read_any(Path("d"))
    assert before.source["sha256"] != after.source["sha256"]
    torch.testing.assert_close(after.modules["m.q_proj"].delta(), 2 * before.modules["m.q_proj"].delta())


def test_a_single_file_is_the_config_beside_it_too(pair, tmp_path):
    folder = tmp_path / "lone"
    folder.mkdir()
    tensors = load_file(pair[0] / "adapter_model.safetensors")
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    shutil.copy(pair[0] / CONFIG, folder / CONFIG)
    file = folder / "pytorch_lora_weights.safetensors"
    before = read_any(file)
    edit(folder / CONFIG, lora_alpha=16)
    after = read_any(file)
    assert before.source["sha256"] != after.source["sha256"]
    (module,) = before.modules
    torch.testing.assert_close(after.modules[module].delta(), 2 * before.modules[module].delta())


def test_heads_are_an_input_too(tmp_path):
    folder = foreign(tmp_path / "a", 0)
    (folder / "heads").mkdir()
    save_file({"score.weight": torch.ones(2, 12)}, folder / "heads" / "t.safetensors")
    before = read_adapter(folder)
    save_file({"score.weight": torch.zeros(2, 12)}, folder / "heads" / "t.safetensors")
    assert read_adapter(folder).source["sha256"] != before.source["sha256"]
