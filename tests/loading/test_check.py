"""plait check: every byte against the manifest, every loader's account, PEFT itself on a base; and its exit codes."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from plait.merging import merge_folders
from tests.command import call
from tests.loading.planted import ROOT, add, causal, change, classifier, configure, drop, save_adapter

LLM = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for name, model in (("causal", causal()), ("tied", causal(tied=True)), ("classifier", classifier())):
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        change(
            save_adapter(root / name, causal(), seed=seed, **LLM),
            configure(base_model_name_or_path=str(bases / "causal")),
        )
    return root


@pytest.fixture
def merged(adapters, tmp_path):
    merge_folders([adapters / "one", adapters / "two"], tmp_path / "merged", method="task_arithmetic", scale=1.0)
    return tmp_path / "merged"


def test_a_merged_folder_passes(capsys, merged):
    code, out, err = call(capsys, "check", merged)
    assert code == 0 and not err and "every file is what the manifest says" in out
    found = json.loads(call(capsys, "check", merged, "--json")[1])
    assert found["ok"] and found["listed"] and not found["changed"] and found["schema"] == 1
    peft = next(a for a in found["accounts"] if a["loader"] == "peft")
    assert peft["effects"] == {"loaded": 8} and len(peft["placements"]) == 8 and peft["verdict"] == "ok"
    tensors = load_file(merged / "adapter_model.safetensors")
    assert {p["tensor"] for p in peft["placements"]} == set(tensors)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "plait.json"])
@pytest.mark.parametrize("place", [0, 0.5, 0.98])
def test_a_flipped_bit_is_found_wherever_it_is(capsys, merged, file, place):
    data = bytearray((merged / file).read_bytes())
    data[int(place * len(data))] ^= 1
    (merged / file).write_bytes(bytes(data))
    code, out, err = call(capsys, "check", merged)
    assert code == 3 and file in out + err


def test_a_file_that_is_gone_or_new_is_found_and_a_card_may_change(capsys, merged):
    (merged / "README.md").write_text("my own words")
    assert call(capsys, "check", merged)[0] == 0
    (merged / "heads").mkdir()
    (merged / "heads" / "more.bin").write_bytes(b"1")
    code, out, _ = call(capsys, "check", merged)
    assert code == 3 and "heads/more.bin" in out
    (merged / "heads" / "more.bin").unlink()
    (merged / "adapter_config.json").unlink()
    code, out, _ = call(capsys, "check", merged)
    assert code == 3 and "adapter_config.json is gone" in out


@pytest.mark.parametrize(
    "loader", ["peft", "vllm", "llama.cpp", "gguf", "trl", "axolotl", "llama-factory", "unsloth", "transformers"]
)
def test_one_loader_is_named(capsys, merged, loader):
    code, out, _ = call(capsys, "check", merged, "--for", loader)
    assert code == 0 and ("llama.cpp" if loader == "gguf" else loader) in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--for", "vlm"), 2, "did you mean 'vllm'"),
        (("--for", "diffusers"), 2, "opens nothing of this kind"),
    ],
)
def test_wrong_loaders(capsys, merged, arguments, code, words):
    got, _, err = call(capsys, "check", merged, *arguments)
    assert got == code and words in err


def test_faults_of_another_loader_count_where_it_is_asked_for(capsys, adapters, tmp_path):
    folder = save_adapter(tmp_path / "a", causal(), **LLM, alpha_pattern={"q_proj": 1})
    assert call(capsys, "check", folder)[0] == 0
    code, out, err = call(capsys, "check", folder, "--for", "gguf")
    assert code == 3 and "alpha_pattern" in err and "loads something else" in out
    assert call(capsys, "check", folder, "--for", "vllm")[0] == 0


def test_nothing_to_check(capsys, tmp_path):
    assert call(capsys, "check", tmp_path / "nowhere")[0] == 3
    (tmp_path / "empty").mkdir()
    assert call(capsys, "check", tmp_path / "empty")[0] == 3


def test_a_folder_of_results_is_checked_result_by_result(capsys, adapters, tmp_path):
    for name in ("a", "b"):
        merge_folders(
            [adapters / "one", adapters / "two"],
            tmp_path / "run" / "merged" / name,
            scale=1.0 if name == "a" else 0.5,
            method="task_arithmetic",
        )
    found = json.loads(call(capsys, "check", tmp_path / "run", "--json")[1])
    assert found["ok"] and [r["path"].rpartition("/")[2] for r in found["results"]] == ["a", "b"]
    weights = tmp_path / "run" / "merged" / "b" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, out, err = call(capsys, "check", tmp_path / "run")
    assert code == 3 and "merged/b" in err and "adapter_model.safetensors" in out


# --- PEFT on a base ---------------------------------------------------------------------------------------------------


def on_base(capsys, folder, base):
    code, out, err = call(capsys, "check", folder, "--base", base, "--json")
    return code, json.loads(out).get("base"), err


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 1}},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"velora_config": {"num_groups": 4}},
    ],
)
@pytest.mark.parametrize("base", ["causal", "tied"])
def test_peft_on_the_base_is_the_base_with_the_updates_added(capsys, bases, tmp_path, config, base):
    folder = save_adapter(tmp_path / "a", causal(tied=base == "tied"), **{**LLM, **config})
    code, found, err = on_base(capsys, folder, bases / base)
    assert code == 0, (found, err)
    assert found["error"] < 1e-5 < 1e-2 < found["effect"] and found["restored"] == 0.0


def test_a_merge_and_a_classifier_on_their_bases(capsys, bases, merged, tmp_path):
    assert on_base(capsys, merged, bases / "causal")[0] == 0
    for name, config in (("c", {"task_type": "SEQ_CLS"}), ("no type", {"modules_to_save": ["classifier"]})):
        folder = save_adapter(tmp_path / name, classifier(), target_modules=["query"], **config)
        code, found, err = on_base(capsys, folder, bases / "classifier")
        assert code == 0 and found["error"] < 1e-5 < found["effect"], err


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop("layers.0.self_attn.q_proj"), "anew"),
        (add(f"{ROOT}model.norm.weight", 16), "overwritten"),
        (add(f"{ROOT}model.nothing.weight", 16), "drops"),
        (configure(base_model_name_or_path="other"), ""),
    ],
)
def test_what_peft_itself_makes_of_a_faulty_folder(capsys, bases, tmp_path, edit, words):
    folder = change(save_adapter(tmp_path / "a", causal(), **LLM), edit)
    code, found, _ = on_base(capsys, folder, bases / "causal")
    assert code == (3 if words else 0) and words in " ".join(found["faults"])


def test_an_adapter_without_effect_is_told(capsys, bases, tmp_path):
    """Names that no module of the base has: PEFT finds one that fits the target, and loads nothing into it."""
    folder = save_adapter(tmp_path / "a", causal(), **LLM)
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {n.replace("model.model.layers", "model.layers"): t for n, t in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors", {"format": "pt"})
    assert call(capsys, "check", folder)[0] == 0  # names alone do not tell
    code, found, _ = on_base(capsys, folder, bases / "causal")
    assert code == 3 and found["effect"] == 0.0 and "no effect" in " ".join(found["faults"])


@pytest.mark.parametrize(
    ("variant", "value"),
    [
        ("use_dora", True),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}),
        ("kasa_config", {}),
        ("alora_invocation_tokens", [3]),
    ],
)
def test_what_a_base_is_not_asked_about(capsys, bases, tmp_path, variant, value):
    folder = save_adapter(tmp_path / "a", causal(), **LLM, **{variant: value})
    code, _, err = call(capsys, "check", folder, "--base", bases / "causal")
    assert code == 3 and f"{variant}: its updates are not scaling * B A" in err


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("single", [False, True])
def test_numbers_that_are_none_are_found_where_no_manifest_tells(capsys, adapters, tmp_path, kind, single):
    place = tmp_path / "copy"
    shutil.copytree(adapters / "one", place)
    tensors = load_file(place / "adapter_model.safetensors")
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] = float(kind)
    save_file(tensors, place / "adapter_model.safetensors")
    if single:
        place = shutil.copyfile(place / "adapter_model.safetensors", tmp_path / "alone.safetensors")
    code, out, err = call(capsys, "check", place)
    assert code == 3 and f"{name} holds NaN or infinity" in out and f"{name} holds NaN or infinity" in err
    found = json.loads(call(capsys, "check", place, "--json")[1])
    assert not found["ok"] and len(found["damaged"]) == 1
