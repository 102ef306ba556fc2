"""What inspect says, and the commands around formats as a person types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.config import CONFIG
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import WEIGHTS, read_adapter, write_adapter
from plait.cli import main
from plait.errors import InputError
from plait.formats.convert import convert
from plait.formats.inspect import inspect
from plait.formats.reading import read_any
from plait.merging import MergeRequest, MergeSpec, answer
from tests.formats.conftest import KOHYA_NAMES, MODULES

SHARED = Path(__file__).parents[3] / "shared" / "adapters"
PUBLIC = ["distilbert_imdb", "distilbert_emotion", "gemma3_270m_svg", "gemma3_270m_svg_stage1"]


def plait(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


@pytest.fixture
def folder(tmp_path) -> Path:
    factors = {f"layer.{m}": LoraFactors(torch.ones(2, 4), torch.ones(6, 2), 1.5) for m in ("q", "v")}
    head = {"topic": {"classifier.weight": torch.ones(3, 4)}}
    (tmp_path / "topic").mkdir()
    write_adapter(tmp_path / "topic", Adapter("topic", "some/base", factors, "SEQ_CLS", "bert", head))
    return tmp_path / "topic"


def changed(folder: Path, **fields) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
    return folder


def test_a_kohya_file(kohya):
    found = inspect(kohya("style", dtype=torch.float16, changed={f"{KOHYA_NAMES[next(iter(MODULES))]}.alpha": None}))
    assert (found.facts.format, found.facts.variant, found.facts.base) == ("kohya", "LoRA", "sd_v1")
    assert found.facts.figures.modules == len(MODULES)
    assert found.facts.figures.module_kinds == {"conv:1x1": 2, "conv:3x3": 1, "linear": 7}
    assert found.facts.figures.ranks == {"3": 10}
    assert found.facts.figures.alphas == {"1.5": 9, "3": 1}
    assert found.facts.figures.without_alpha == 1
    assert found.facts.dtypes == ("float16",)
    assert found.facts.problem is None
    assert "merge" in found.facts.can[0]


def test_a_folder(folder):
    found = inspect(folder)
    assert (found.facts.format, found.facts.task_type, found.facts.figures.heads) == ("peft", "SEQ_CLS", ("topic",))
    assert found.facts.figures.targets == {"q": 1, "v": 1}
    assert found.facts.figures.update_norm == pytest.approx((2 * 24 * 9) ** 0.5)
    assert found.facts.size_mb == pytest.approx((2 * (8 + 12) + 12) * 4 / 1e6)


@pytest.mark.parametrize(
    ("fields", "variant", "way"),
    [
        ({"use_dora": True}, "DoRA", "--base"),
        ({"init_lora_weights": "pissa_niter_4"}, "LoRA started by pissa_niter_4", "--initial"),
        ({"lora_bias": True}, "lora_bias", "--drop-bias"),
        ({"kasa_config": {"x": 1}}, "KaSA", None),
    ],
)
def test_variants_are_named_with_their_way_out(folder, fields, variant, way):
    found = inspect(changed(folder, **fields))
    assert found.facts.variant == variant
    assert found.facts.problem
    assert (way in found.facts.can[0]) if way else found.facts.can == ()


def test_files_that_are_no_plain_lora(tmp_path):
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
    found = inspect(tmp_path / "loha.safetensors")
    assert found.facts.variant == "LoHa"
    assert found.facts.can == ()
    with pytest.raises(InputError, match="no such file or folder"):
        inspect(tmp_path / "none")
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        inspect(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "null", '"x"', "5"])
def test_a_config_that_is_no_object(folder, text, capsys):
    (folder / CONFIG).write_text(text)
    assert plait("inspect", folder) == 3
    assert f"{folder / CONFIG}: not a JSON object" in capsys.readouterr().err


def test_foreign_text_in_a_config_cannot_write_to_the_terminal(folder, capsys):
    changed(folder, base_model_name_or_path="some\x1b[2J/base", revision="\x07")
    assert plait("inspect", folder) == 0
    said = capsys.readouterr().out
    assert "some\\x1b[2J/base" in said and "\x1b" not in said and "\n" in said


def test_commands_from_files_to_files(kohya, tmp_path, capsys):
    a, b, merged = kohya("a", 1), kohya("b", 2), tmp_path / "m.safetensors"
    assert plait("inspect", a) == 0
    assert "kinds      linear (7), conv:1x1 (2), conv:3x3 (1)" in capsys.readouterr().out
    assert plait("merge", a, b, "--method", "tsv", "--out", merged) == 0
    assert "tsv at scale 0.7 of a, b" in capsys.readouterr().out
    assert plait("inspect", merged) == 0
    assert "merge of   a, b (tsv)" in capsys.readouterr().out
    assert plait("convert", merged, "--to", "diffusers", "--out", tmp_path / "d.safetensors") == 0
    assert "verified" in capsys.readouterr().out
    c = kohya("c", 3)
    edited = tmp_path / "e.safetensors"
    assert plait("edit", merged, "--add", c, "--remove", "a", "--weight", "b=-0.5", "--out", edited, "--json") == 0
    assert json.loads(capsys.readouterr().out)["weights"] == [-0.5, 1.0]
    assert plait("convert", merged, "--to", "peft", "--out", tmp_path / "p") == 0
    capsys.readouterr()
    assert plait("inspect", tmp_path / "p") == 0
    assert "text_encoder\n" in capsys.readouterr().out
    assert plait("edit", merged, "--weight", "b", "--out", edited) == 2
    assert plait("convert", a, "--to", "ckpt", "--out", tmp_path / "x") == 2
    assert plait("inspect", tmp_path / "absent.safetensors") == 3


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public adapters are not here")
@pytest.mark.parametrize("name", PUBLIC)
def test_public_adapters_convert_to_themselves(tmp_path, name):
    found = inspect(SHARED / name)
    assert found.facts.problem is None
    assert convert(SHARED / name, tmp_path / "out").record.verification_error == 0.0
    before, after = load_file(SHARED / name / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public adapters are not here")
def test_a_public_adapter_in_a_single_file_and_back(tmp_path):
    """No diffusion adapter is at hand; these names are a language model's, which diffusers' format can spell."""
    source = SHARED / "gemma3_270m_svg"
    with pytest.raises(InputError, match=r"does not start with a word"):
        convert(source, tmp_path / "f.safetensors", to="kohya", component="text_encoder")
    convert(source, tmp_path / "f.safetensors", to="diffusers", component="text_encoder")
    convert(tmp_path / "f.safetensors", tmp_path / "back")
    before, after = read_adapter(source), read_adapter(tmp_path / "back" / "text_encoder")
    for module, f in before.modules.items():
        assert torch.equal(f.delta(), after.modules[module].delta())  # alpha / r = 4: folded without rounding


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public adapters are not here")
def test_public_stages_are_no_stack_and_merge_and_edit(tmp_path, capsys):
    stages = [SHARED / "gemma3_270m_svg_stage1", SHARED / "gemma3_270m_svg"]
    assert plait("merge", "--stack", *stages, "--out", tmp_path / "s") == 3
    assert "one adapter at two stages of training (their A agree to 0.99" in capsys.readouterr().err
    tasks = [SHARED / "distilbert_imdb", SHARED / "distilbert_emotion"]
    assert plait("merge", *tasks, "--method", "task_arithmetic", "--scale", "1", "--out", tmp_path / "m") == 0
    assert (
        plait("edit", tmp_path / "m", "--remove", "distilbert_emotion", "--by-difference", "--out", tmp_path / "l") == 0
    )
    alone, left = read_adapter(tasks[0]), read_adapter(tmp_path / "l")
    assert list(left.heads) == ["distilbert_imdb"]
    for module, f in alone.modules.items():
        torch.testing.assert_close(left.modules[module].delta(), f.delta(), rtol=1e-4, atol=1e-6)


def test_nothing_reads_names_as_paths(kohya, tmp_path):
    kohya("a", 1)
    assert read_any(tmp_path / "a.safetensors", name="mine").name == "mine"


def test_an_adapter_on_another_is_recognised(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "top")
    changed(tmp_path / "top", base_model_name_or_path="topic")
    found = inspect(tmp_path / "top")
    assert Path(found.facts.stacked_on) == folder
    assert any("--stack" in c for c in found.facts.can)
    assert inspect(folder).facts.stacked_on is None


def test_an_adapter_on_a_baked_model(tmp_path, tiny_base):
    base = tiny_base("llama").name
    name = "model.layers.0.self_attn.q_proj"
    for which, below in (("one", base), ("two", str(tmp_path / "full")), ("three", str(tmp_path / "full"))):
        factors = {name: LoraFactors(torch.randn(2, 32), torch.randn(32, 2), 1.0)}
        (tmp_path / which).mkdir()
        write_adapter(tmp_path / which, Adapter(which, below, factors, "CAUSAL_LM"))
    answer(
        MergeRequest(
            [str(tmp_path / "one")],
            tmp_path / "full",
            MergeSpec("task_arithmetic", scale=1.0),
            bake_into=Path(base),
        )
    )
    found = answer(MergeRequest([str(tmp_path / n) for n in ("two", "one")], tmp_path / "s", stack=True))
    assert [s.name for s in found.record.stack] == ["one", "two"]
    both = sum(read_adapter(tmp_path / n).modules[name].delta() for n in ("one", "two"))
    torch.testing.assert_close(read_adapter(tmp_path / "s").modules[name].delta(), both)
    with pytest.raises(InputError, match="not among the adapters given"):
        answer(MergeRequest([str(tmp_path / n) for n in ("two", "three")], tmp_path / "t", stack=True))
