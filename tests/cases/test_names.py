"""Names: adapters' names in tensor names, one module under two names, adapters without a common module, folders below, revisions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.cases.conftest import (
    IDS,
    changed_config,
    changed_tensors,
    deltas,
    far,
    folder_of,
    llama,
    loaded,
    logits,
    trained,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*embedding.*", "ignore:.*tie.*", "ignore:.*config file.*", "ignore:Adapter 'default'"
)
ROOT = "base_model.model."
SHAPES = {"q_proj": (32, 32), "v_proj": (16, 32)}


def layers(root: str, names=("q_proj", "v_proj")) -> dict[str, tuple[int, int]]:
    return {f"{root}layers.{i}.self_attn.{n}": SHAPES[n] for i in (0, 1) for n in names}


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for module, delta in wanted.items():
        assert float((found[module] - delta).norm() / delta.norm()) < 1e-6, module


# --- an adapter's name in the names of tensors ------------------------------------------------------------------------


def with_name(name: str):
    """Names as they are in a wrapped model, before PEFT's save_pretrained takes the adapter's out."""

    def change(tensors):
        found = {}
        for key, tensor in tensors.items():
            new = re.sub(r"(lora_[AB])\.weight$", rf"\1.{name}.weight", key)
            new = re.sub(r"(lora_embedding_[AB])$", rf"\1.{name}", new)
            new = re.sub(r"(embed_tokens)\.weight$", rf"\1.modules_to_save.{name}.weight", new)
            found[new] = tensor
        return found

    return change


@pytest.mark.parametrize("name", ["default", "policy"])
@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"]},
    ],
)
def test_a_state_dict_saved_by_hand_is_the_adapter(name, more, plait, tmp_path):
    wanted = trained(tmp_path / "in/a", llama(tied=False), **more)
    changed_tensors(tmp_path / "in/a", with_name(name))
    assert any(f".{name}" in k for k in load_file("in/a/adapter_model.safetensors"))
    llama(tied=False).save_pretrained("in/base")
    for command in ("merge in/a --out m", "convert in/a --base in/base --rank 32 --out c"):
        code, _, err = plait(command)
        assert code == 0, err
    for folder in ("m", "c"):
        assert not any(name in k for k in load_file(f"{folder}/adapter_model.safetensors"))
        assert far(logits(loaded(folder, llama(tied=False))), wanted, logits(llama(tied=False))) < 1e-5


def test_two_adapters_in_one_file(plait, tmp_path):
    folder_of(tmp_path / "in/a", layers("model."))
    changed_tensors(tmp_path / "in/a", lambda t: with_name("train")(t) | with_name("reference")(t))
    for command in ("merge in/a --out m", "convert in/a --out m"):
        code, _, err = plait(command)
        assert (
            code == 3
            and "holds the adapters '" in err
            and "'train'" in err
            and "'reference'" in err
            and "selected_adapters" in err
        )


def test_a_tensor_with_and_without_the_name(plait, tmp_path):
    folder_of(tmp_path / "in/a", layers("model."))
    changed_tensors(tmp_path / "in/a", lambda t: t | with_name("default")(t))
    code, _, err = plait("merge in/a --out m")
    assert code == 3 and "with and without the adapter's name" in err


def test_the_shared_case_of_names_in_files(case, plait):
    case("04_adapter_name_in_keys")
    assert plait("merge in/one.safetensors in/two.safetensors --out m.safetensors")[0] == 3  # names that tell no alpha
    with safe_open("in/one.safetensors", "pt") as file:
        rank = min(file.get_slice(k).get_shape()[0] for k in file.keys() if ".lora_A" in k)  # noqa: SIM118
    Path("in/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    assert plait("merge in/one.safetensors in/two.safetensors --out m.safetensors")[0] == 0
    tensors = [load_file(f) for f in ("in/one.safetensors", "in/plain.safetensors", "m.safetensors")]  # plain is two
    modules = {k.split(".lora_")[0] for k in tensors[1]}
    for m in modules:
        one, two, both = (
            next(v for k, v in t.items() if k.startswith(f"{m}.lora_B")).double()
            @ next(v for k, v in t.items() if k.startswith(f"{m}.lora_A")).double()
            for t in tensors
        )
        assert float((one + two - both).norm() / both.norm()) < 1e-6
    for command in ("merge in/rl_step40 --out m", "convert in/rl_step40 --out c", "inspect in/rl_step40"):
        code, out, err = plait(command)
        assert code == 0 and "nothing here" not in out, err


def test_a_file_without_factors_says_what_it_holds(plait, tmp_path):
    (tmp_path / "in").mkdir()
    save_file({"blocks.0.attn.weight": torch.ones(2, 2)}, tmp_path / "in/full.safetensors")
    code, _, err = plait("inspect in/full.safetensors --json")
    assert code == 0
    code, _, err = plait("merge in/full.safetensors --out m.safetensors")
    assert code == 3 and "1 tensor, none of them called lora_A" in err and "'blocks.0.attn.weight'" in err


# --- one module under two names ---------------------------------------------------------------------------------------

TWO_NAMES = [
    ("model.", "model.language_model."),
    ("model.language_model.", "language_model.model."),
    ("model.", "language_model.model."),
    ("", "model."),
    ("model.llm.", "model.language_model."),
]


@pytest.mark.parametrize(("old", "new"), TWO_NAMES)
@pytest.mark.parametrize("method", ["task_arithmetic", "tsv"])
def test_the_same_modules_by_other_names_are_no_others(old, new, method, plait, tmp_path):
    before, after = (
        folder_of(tmp_path / "in/before", layers(old)),
        folder_of(tmp_path / "in/after", layers(new), seed=2),
    )
    code, _, err = plait(f"merge in/before in/after --method {method} --out m")
    assert code == 3 and "their module names start at different roots" in err and not Path("m").exists()
    assert plait("advise in/before in/after")[1].count("different roots") == 1
    words = err.split()
    given, rename = words[words.index("convert") + 1], next(w for w in words if "=" in w)
    assert plait(f"convert {given} --rename {rename} --out renamed")[0] == 0  # as the error says
    code, _, err = plait(f"merge renamed {'in/after' if given == 'in/before' else 'in/before'} --out m")
    assert code == 0, err
    old, new = (old, new) if given == "in/before" else (new, old)
    before, after = (before, after) if given == "in/before" else (after, before)
    summed = {m: deltas(before)[old + m.removeprefix(new)] + d for m, d in deltas(after).items()}
    close(deltas(Path("m")), summed)


def test_two_names_for_some_of_the_modules(plait, tmp_path):
    shared = {"visual.blocks.0.attn.qkv": (48, 32)}
    folder_of(tmp_path / "in/a", layers("model.") | shared)
    folder_of(tmp_path / "in/b", layers("model.language_model.") | shared, seed=2)
    code, _, err = plait("merge in/a in/b --out m")
    assert code == 3 and "--rename model=model.language_model" in err


def test_modules_of_equal_names_in_two_towers_are_two(plait, tmp_path):
    both = {**layers("text_model.encoder."), **layers("vision_model.encoder.")}
    folder_of(tmp_path / "in/a", both)
    folder_of(tmp_path / "in/b", layers("vision_model.encoder."), seed=2)
    code, _, err = plait("merge in/a in/b --out m")
    assert code == 0, err


def test_no_module_in_common_is_a_question(plait, tmp_path):
    q = folder_of(tmp_path / "in/q", layers("model.", ("q_proj",)))
    v = folder_of(tmp_path / "in/v", layers("model.", ("v_proj",)), seed=2)
    qv = folder_of(tmp_path / "in/qv", layers("model."), seed=3)
    code, _, err = plait("merge in/q in/v --out m")
    assert code == 3 and "'q' and 'v' have no module in common" in err and "--disjoint" in err
    assert "no module in common" in plait("advise in/q in/v")[1]
    assert plait("merge auto in/q in/v --out m")[0] == 3 and not Path("m").exists()
    code, _, err = plait("merge in/q in/v --disjoint --out m")
    assert code == 0, err
    close(deltas(Path("m")), deltas(q) | deltas(v))
    assert plait("edit m --weight q=0.5 --out e")[0] == 0  # what was said once is recorded
    close(deltas(Path("e")), {m: d * 0.5 for m, d in deltas(q).items()} | deltas(v))
    assert plait("merge in/q in/qv in/v --out m3")[0] == 0  # through qv all three share modules
    parts, whole = deltas(q) | deltas(v), deltas(qv)
    close(deltas(Path("m3")), {m: parts[m] + d for m, d in whole.items()})


def test_parts_of_a_pipeline_share_no_module_and_need_no_word(plait, tmp_path):
    (tmp_path / "in").mkdir()
    for name, module in (("unet", "lora_unet_down_blocks_0_q"), ("text", "lora_te_text_model_layers_0_q")):
        tensors = {
            f"{module}.lora_down.weight": torch.ones(2, 8),
            f"{module}.lora_up.weight": torch.ones(8, 2),
            f"{module}.alpha": torch.tensor(2.0),
        }
        save_file(tensors, tmp_path / f"in/{name}.safetensors")
    code, _, err = plait("merge in/unet.safetensors in/text.safetensors --out m.safetensors")
    assert code == 0, err


@pytest.mark.parametrize("adapter", ["after", "before", "wrapped"])
@pytest.mark.parametrize("base", ["base_old_names", "base_new_names"])
def test_a_base_s_files_may_have_the_names_of_another_version(adapter, base, case, plait):
    case("05_vlm_prefix")
    code, _, err = plait(f"merge in/{adapter} --bake in/{base} --out b")
    assert code == 0, err
    old, new = load_file(f"in/{base}/model.safetensors"), load_file("b/model.safetensors")
    assert old.keys() == new.keys() and torch.equal(
        old["visual.blocks.0.attn.qkv.weight"], new["visual.blocks.0.attn.qkv.weight"]
    )
    for module, delta in deltas(Path(f"in/{adapter}")).items():
        inside = "layers." + module.split("layers.")[1]
        name = next(n for n in old if n.endswith(f"{inside}.weight"))
        assert float((new[name] - old[name] - delta).norm() / delta.norm()) < 1e-5


def test_a_base_without_the_module_says_what_it_holds_instead(case, plait, tmp_path):
    case("05_vlm_prefix")
    folder_of(tmp_path / "in/other", {"model.layers.0.self_attn.z_proj": (32, 32)})
    code, _, err = plait("merge in/other --bake in/base_old_names --out b")
    assert code == 3 and "holds no weight for module 'model.layers.0.self_attn.z_proj'" in err
    assert "nearest in its files: model.layers.0.self_attn.q_proj.weight" in err


def test_a_fresh_adapter_of_a_vision_language_model_is_baked(plait, tmp_path):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text |= {
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}}
    sight = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}

    def made():
        torch.manual_seed(0)
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=sight, **ids)).eval()

    made().save_pretrained(tmp_path / "in/base")
    wanted = trained(tmp_path / "in/a", made(), target_modules=["q_proj", "v_proj"])
    code, _, err = plait("merge in/a --bake in/base --out b")
    assert code == 0, err
    with torch.no_grad():
        found = Qwen2_5_VLForConditionalGeneration.from_pretrained("b").eval()(input_ids=IDS).logits
    assert far(found, wanted, logits(made())) < 1e-5


@pytest.mark.parametrize("wrong", ["model", "a=b=c", "nothing=model", "model.layers.0=model.layers.1"])
def test_renames_that_cannot_be(wrong, plait, tmp_path):
    folder_of(tmp_path / "in/a", layers("model."))
    code, _, err = plait(f"convert in/a --rename {wrong} --out m")
    assert code == 2 and "--rename" in err and not Path("m").exists()


# --- adapters in folders below ----------------------------------------------------------------------------------------


def test_folders_of_adapters_are_listed_and_named(case, plait):
    case("10_adapters_in_subfolders")
    code, out, _ = plait("inspect in/three")
    assert code == 0 and "inside     in/three/german: an adapter of its own" in out and "in/three/polite" in out
    code, out, _ = plait("inspect in/dpo")
    assert code == 0 and "no adapter itself, 2 in folders of it" in out and "train" in out and "reference" in out
    for command in (
        "merge in/dpo --out m",
        "convert in/dpo --out m",
        "convert in/dpo --to kohya --out m.safetensors",
        "advise in/dpo",
    ):
        code, _, err = plait(command)
        assert code in (2, 3) and "in it lie in/dpo/reference, in/dpo/train: name those" in err, command
    assert plait("merge in/three in/three/polite --out m")[0] == 0


def test_folders_further_below_and_json(plait, tmp_path):
    folder_of(tmp_path / "in/runs/a/checkpoint-10", layers("model."))
    folder_of(tmp_path / "in/runs/b/checkpoint-10", layers("model."), seed=2)
    _, out, _ = plait("inspect in/runs --json")
    assert sorted(json.loads(out)["adapters"]) == ["a/checkpoint-10", "b/checkpoint-10"]
    assert "in it lie in/runs/a/checkpoint-10" in plait("merge in/runs --out m")[2]


def test_a_pipeline_s_folders_are_still_a_pipeline(plait, tmp_path):
    folder_of(tmp_path / "in/p/unet", {"down_blocks.0.attentions.0.to_q": (8, 8)})
    folder_of(tmp_path / "in/p/text_encoder", {"text_model.encoder.layers.0.self_attn.q_proj": (8, 8)})
    _, out, _ = plait("inspect in/p --json")
    assert sorted(json.loads(out)["components"]) == ["text_encoder", "unet"]


# --- revisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "two", "code"),
    [(None, "main", 0), ("main", None, 0), ("main", "main", 0), (None, "v1", 3), ("main", "v1", 3)],
)
def test_no_revision_is_main(one, two, code, plait, tmp_path):
    for name, revision in (("a", one), ("b", two)):
        folder_of(tmp_path / f"in/{name}", layers("model."), seed=ord(name), revision=revision)
    found, _, err = plait("merge in/a in/b --out m")
    assert found == code, err
    if code == 0:
        close(deltas(Path("m")), {m: d + deltas(Path("in/b"))[m] for m, d in deltas(Path("in/a")).items()})


def test_the_shared_case_of_revisions(case, plait, tmp_path):
    case("25_revision_main")
    assert plait("merge in/a in/b --out m")[0] == 0
    shutil.rmtree(tmp_path / "m")
    changed_config(tmp_path / "in/b", revision="0123abc")
    assert plait("merge in/a in/b --out m")[0] == 3
