"""Every command of docs/formats.md, run in the page's order."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.config import CONFIG
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import WEIGHTS, write_adapter
from plait.cli import main
from tests.test_readme import BLOCK

GUIDE = Path(__file__).parents[2] / "docs" / "formats.md"


def lines() -> list[str]:
    return [
        line for kind, text in BLOCK.findall(GUIDE.read_text("utf-8")) if kind == "bash" for line in text.splitlines()
    ]


def adapter(root: Path, name: str, base: str, seed: int, **fields) -> Path:
    generator = torch.Generator().manual_seed(seed)
    name_of = "model.layers.0.self_attn.q_proj"
    factors = LoraFactors(torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator), 1.0)
    (root / name).mkdir(parents=True)
    write_adapter(root / name, Adapter(name, base, {name_of: factors}, "CAUSAL_LM"))
    config = json.loads((root / name / CONFIG).read_text())
    (root / name / CONFIG).write_text(json.dumps({**config, **fields}))
    return root / name


def test_the_guide_runs(kohya, tmp_path, tiny_base, monkeypatch, capsys):
    for seed, name in enumerate(("style", "character", "extra")):
        kohya(name, seed)
    shutil.copytree(tiny_base("llama").name, tmp_path / "base")
    root = tmp_path / "adapters"
    dora = adapter(root, "dora", "base", 1, use_dora=True)
    stored = load_file(dora / WEIGHTS)
    key = next(iter(stored)).split(".lora_")[0]
    save_file({**stored, f"{key}.lora_magnitude_vector": torch.rand(32)}, dora / WEIGHTS)
    adapter(root, "pissa", "base", 2, init_lora_weights="pissa")
    adapter(root, "pissa-start", "base", 3, init_lora_weights="pissa")
    adapter(root, "first", "base", 4)
    adapter(root, "second", "first", 5)
    monkeypatch.chdir(tmp_path)
    assert len(lines()) == 14
    for line in lines():
        with pytest.raises(SystemExit) as stopped:
            main(shlex.split(line)[1:])
        said = capsys.readouterr()
        assert stopped.value.code == 0, f"{line}: {said.err}"
    same = [load_file(tmp_path / f"{n}.safetensors") for n in ("merged", "back")]
    assert same[0].keys() == same[1].keys()
    assert all(torch.equal(tensor, same[1][key]) for key, tensor in same[0].items())
