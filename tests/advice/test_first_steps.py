"""What a new user stumbles over with downloaded folders: every case ends in the next step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.adapters.lineage import same_name
from plait.adapters.lora import EMBEDDING, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.errors import InputError
from plait.fidelity.arguments import recorded_base, split_base
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.score import fidelities
from tests.command import call
from tests.formats.conftest import factors_of, kohya_tensors
from tests.panels import folders_of, random_adapter, text_file, texts_of


@pytest.fixture
def pair(make_panel, tmp_path) -> tuple[Panel, list[str]]:
    panel = make_panel("llama", "causal", texts=8)
    return panel, folders_of(panel, tmp_path)


def image_files(root: Path) -> list[str]:
    from safetensors.torch import save_file

    for seed, name in enumerate(("style", "character")):
        save_file(kohya_tensors(factors_of(seed)), root / f"{name}.safetensors")
    return [str(root / "style.safetensors"), str(root / "character.safetensors")]


def test_the_next_command_can_be_pasted(pair, capsys):
    panel, (one, two) = pair
    code, out, err = call(capsys, "advise", one, two)
    assert code == 0, err
    assert f"plait advise {panel.base.name} {one} {two} --text one=FILE --text two=FILE" in out
    assert "is not at hand" not in out, "the base that both name is a folder here: its size is known"


def test_the_base_that_all_name_reads_the_texts(pair, tmp_path, capsys):
    panel, folders = pair
    texts = [f"--text={text_file(panel, t, tmp_path)}" for t in ("one", "two")]
    rest = ["--max-length", "24", "--refine", "0", "--device", "cpu", "--json", "--out", str(tmp_path / "out")]
    code, out, err = call(capsys, "merge", "auto", *folders, *texts, *rest)
    assert code == 0, err
    assert f"base: {panel.base.name}, as the adapters name it" in err
    assert json.loads(out)["fidelity"]["tasks"]
    one, two = (read_adapter(Path(f)) for f in folders)
    assert recorded_base([one, replace(two, base="another")]) is None
    assert recorded_base([replace(one, base="nobody/has-this")]) is None


def test_too_long_texts_are_told_the_option(make_panel, tmp_path, capsys):
    panel = make_panel("gpt2", "causal", texts=8)
    folders = folders_of(panel, tmp_path)
    (tmp_path / "one.txt").write_text("w1 " * 100)
    texts = [f"--text=one={tmp_path / 'one.txt'}", f"--text={text_file(panel, 'two', tmp_path)}"]
    for command in (["merge", "auto"], ["advise"]):
        out = ["--out", str(tmp_path / "out")] if command[0] == "merge" else []
        code, _, err = call(capsys, *command, panel.base.name, *folders, *texts, *out, "--device", "cpu")
        assert code == 3 and "(cut rows to that: --max-length 64, or " in err


def test_folders_that_are_none_say_what_lies_in_them(pair, tmp_path, capsys):
    _, (one, two) = pair
    (tmp_path / "downloads" / "deep").mkdir(parents=True)
    Path(two).rename(tmp_path / "downloads" / "deep" / "two")
    for given in ([str(tmp_path / "downloads"), one], [one, str(tmp_path / "downloads")]):
        code, _, err = call(capsys, "advise", *given)
        assert code == 3 and "deep/two: name those" in err
    code, _, err = call(capsys, "advise", str(tmp_path / "downloads"))
    assert code == 2 and "deep/two: name those" in err
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"neither an adapter .* nor a base"):
        split_base([str(tmp_path / "empty"), one])


def test_a_weights_file_stands_for_its_folder(pair, capsys):
    _, (one, two) = pair
    code, out, err = call(capsys, "advise", f"{one}/adapter_model.safetensors", f"{two}/adapter_model.safetensors")
    assert code == 0, err
    assert "--text one=FILE --text two=FILE" in out


def test_folders_of_one_name_are_told_how_to_differ(pair, tmp_path, capsys):
    _, (one, two) = pair
    (tmp_path / "b").mkdir()
    Path(two).rename(tmp_path / "b" / "one")
    write_adapter(tmp_path / "b" / "one", replace(read_adapter(tmp_path / "b" / "one"), name="one"))
    code, _, err = call(capsys, "advise", one, str(tmp_path / "b" / "one"))
    assert code == 2 and f"b-one={tmp_path}/b/one" in err
    code, _, err = call(capsys, "merge", one, one, "--out", str(tmp_path / "no"))
    assert code == 2 and "given twice (leave one of them out" in err


def test_names_of_one_base_need_not_agree_to_the_letter():
    assert same_name("google/gemma-3-270m-it", "gemma3-270m-it")
    assert same_name("meta-llama/Llama-3.2-1B", "/models/llama-3.2-1b/")
    assert not same_name("gemma-3-270m-it", "gemma-3-270m")


def test_another_base_is_noticed(pair, tiny_base, make_panel, tmp_path, capsys):
    panel, folders = pair
    texts = [f"--text={text_file(panel, t, tmp_path)}" for t in ("one", "two")]
    rest = ["--max-length", "24", "--refine", "0", "--repair", "0", "--device", "cpu"]
    code, _, err = call(capsys, "advise", tiny_base("bert").name, *folders, *texts, *rest)
    assert code == 3 and "a backbone alone predicts no text" in err
    from tests.tiny import save_model

    other = str(save_model(tmp_path / "other", "llama", seed=9))
    code, out, err = call(capsys, "advise", other, *folders, *texts, *rest)
    assert code == 0, err
    assert f"{other} was given: what is measured holds where both are the same weights" in out


def test_what_is_trained_beside_linear_modules_is_not_left_out_silently(pair, tiny_base, tmp_path, capsys):
    _, (one, two) = pair
    changed = replace(read_adapter(Path(two)), extras={"lm_head.weight": torch.zeros(65, 32)})
    write_adapter(Path(two), changed)
    code, out, err = call(capsys, "advise", one, two)
    assert code == 0, err
    assert "two also trained lm_head.weight whole" in out and "modules_to_save" in out
    code, out, err = call(capsys, "merge", "auto", one, two, "--out", str(tmp_path / "out"))
    assert code == 3 and "'lm_head.weight' was trained whole" in err and f"plait convert {two} --base" in err
    with pytest.raises(InputError, match=r"lm_head.weight whole"):
        parts_of([changed])
    words = {"model.embed_tokens": LoraFactors(torch.ones(2, 65), torch.ones(32, 2), 1.0, EMBEDDING)}
    with pytest.raises(InputError, match="compared for linear layers only"):
        parts_of(
            [random_adapter(tiny_base("llama"), "llama", "x", "causal", 1), replace(changed, extras={}, modules=words)]
        )


def test_files_of_image_models_get_no_advice_for_text(pair, tmp_path, capsys):
    _, (one, _) = pair
    files = image_files(tmp_path)
    code, out, err = call(capsys, "advise", *files)
    assert code == 0, err
    assert "vLLM" not in out and "--text" not in out and "pictures" in out and "set_adapters" in out
    code, out, err = call(capsys, "advise", one, files[0])
    assert code == 0 and "an image model" in out, err
    code, out, err = call(capsys, "merge", "auto", *files, "--out", str(tmp_path / "m.safetensors"))
    assert code == 0 and "--text" not in out, err


def test_adapters_that_choose_what_the_base_chooses_tell_nothing(tiny_base):
    from plait.choosing.notes import alike

    base = tiny_base("llama")
    one = random_adapter(base, "llama", "one", "causal", 1, size=1e-7)
    two = random_adapter(base, "llama", "two", "causal", 2)
    panel = Panel(base, parts_of([one, two]), {"one": texts_of(4), "two": texts_of(4, 1)}, max_length=24)
    said = alike(fidelities(panel, [(two, 1.0)]))
    assert len(said) == 1 and said[0].startswith("how well one is kept")


def test_adapters_of_one_descent_are_averaged_and_one_may_stand_for_both(pair, tmp_path, capsys):
    _, (one, two) = pair
    first = read_adapter(Path(one))
    g = torch.Generator().manual_seed(3)
    near = {
        m: replace(f, B=f.B + 0.1 * f.B.std() * torch.randn(f.B.shape, generator=g)) for m, f in first.modules.items()
    }
    write_adapter(Path(two), replace(first, name="two", modules=near))
    code, out, err = call(capsys, "merge", "auto", one, two, "--out", str(tmp_path / "out"))
    assert code == 0 and "since one and two point the same way" in out, err
    chosen = json.loads((tmp_path / "out" / "plait.json").read_text())["result"]
    assert chosen["chosen"]["candidate"] == chosen["evidence"][0]["candidate"]
    code, out, err = call(capsys, "advise", one, two)
    assert code == 0 and "alone by" in out, err


def test_a_choice_from_factors_is_made_again_with_other_adapters(pair, tiny_base, tmp_path, capsys):
    _, (one, two) = pair
    third = random_adapter(tiny_base("llama"), "llama", "three", "causal", 5)
    (tmp_path / "three").mkdir()
    write_adapter(tmp_path / "three", third)
    chosen, edited, anew = (str(tmp_path / n) for n in ("chosen", "edited", "anew"))
    assert call(capsys, "merge", "auto", one, two, "--out", chosen)[0] == 0
    rest = ["--add", str(tmp_path / "three"), "--remove", "one", "--out", edited]
    code, out, err = call(capsys, "edit", chosen, *rest)
    assert code == 0 and "of two, three" in out, err
    assert call(capsys, "merge", "auto", two, str(tmp_path / "three"), "--out", anew)[0] == 0
    weights = [(Path(p) / "adapter_model.safetensors").read_bytes() for p in (edited, anew)]
    assert weights[0] == weights[1]
    code, _, err = call(capsys, "edit", chosen, "--weight", "one=0.5", "--out", str(tmp_path / "no"))
    assert code == 2 and "chooses weights and scale itself" in err
    code, _, err = call(capsys, "edit", chosen, "--remove", "one", "--by-difference", "--out", str(tmp_path / "no"))
    assert code == 2 and "chosen anew" in err
    Path(one).rename(tmp_path / "moved")
    code, _, err = call(capsys, "edit", chosen, "--add", str(tmp_path / "three"), "--out", str(tmp_path / "no"))
    assert code == 3 and "--input NAME=PATH" in err
    code, _, err = call(capsys, "edit", chosen, "--input", f"one={tmp_path / 'moved'}", "--out", str(tmp_path / "same"))
    assert code == 0, err


def test_a_stack_is_composed(pair, tmp_path, capsys):
    _, (one, two) = pair
    config = Path(two, "adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": one}))
    Path(two, "plait.json").unlink(missing_ok=True)
    code, out, err = call(capsys, "advise", two, one)
    assert code == 0, err
    assert "two on one was trained as a stack" in out and f"plait merge --stack {one} {two} --out DIR" in out
    assert "serve separately" not in out


def test_a_negative_weight_apart_from_the_others(pair, tmp_path, capsys):
    _, (one, two) = pair
    code, _, err = call(capsys, "merge", one, two, "--weights", "1", "-1", "--out", str(tmp_path / "no"))
    assert code == 2 and "--weights 1,-1" in err


def test_parts_of_a_pipeline_are_not_merged_into_one_adapter(tmp_path, capsys):
    files = image_files(tmp_path)
    assert call(capsys, "convert", files[0], "--to", "peft", "--out", str(tmp_path / "parts"))[0] == 0
    parts = [str(tmp_path / "parts" / p) for p in ("unet", "text_encoder")]
    code, _, err = call(capsys, "merge", *parts, "--out", str(tmp_path / "no"))
    assert code == 3 and "no module in common" in err
    code, _, err = call(capsys, "advise", str(tmp_path / "parts"))
    assert code == 2 and "parts/unet: name those" in err
    code, _, err = call(capsys, "advise", str(tmp_path / "nowhere"))
    assert code == 2 and "nowhere is none" in err
