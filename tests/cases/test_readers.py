"""Readers: what they cannot merge is called by its name, what they can is read exactly; regexes as PEFT matches them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.cases.conftest import changed_config, changed_tensors, deltas, far, folder_of, llama, loaded, logits, trained

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*embedding.*",
    "ignore:.*tie.*",
    "ignore:.*config file.*",
    "ignore:.*groups > 1.*",
    "ignore:Adapter 'default'",
)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

# --- grouped convolutions ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Conv2d(4, 8, 3)
        self.flat = nn.Conv1d(8, 8, 4, groups=4)
        self.point = nn.Conv2d(8, 16, 1, groups=2)
        self.deep = nn.Conv2d(16, 16, 3, groups=16)


@pytest.mark.parametrize(("target", "rank", "groups"), [("flat", 4, 4), ("point", 4, 2), ("deep", 16, 16)])
@pytest.mark.parametrize("command", ["merge in/a --out m", "convert in/a --out m", "inspect in/a"])
def test_grouped_convolutions_are_refused_by_that_name(target, rank, groups, command, plait, tmp_path):
    trained_net(tmp_path / "in/a", [target, "plain"], rank)
    code, out, err = plait(command)
    assert f"a grouped convolution of {groups} groups" in out + err and target in out + err
    assert code == (0 if command.startswith("inspect") else 3) and not Path("m").exists()


def trained_net(folder: Path, targets: list[str], rank: int) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Net(), LoraConfig(r=rank, lora_alpha=8, target_modules=targets))
    model.peft_config["default"].base_model_name_or_path = "org/net"
    model.save_pretrained(folder, save_embedding_layers=False)


def test_what_is_damaged_is_not_called_grouped(plait, tmp_path):
    trained_net(tmp_path / "in/a", ["plain"], 4)
    changed_tensors(
        tmp_path / "in/a", lambda t: {k: v[:, :3].contiguous() if "lora_B" in k else v for k, v in t.items()}
    )
    code, _, err = plait("merge in/a --out m")
    assert code == 3 and "have no rank in common" in err


def test_the_shared_case_of_convolutions(case, plait):
    case("09_grouped_conv")
    assert plait("merge in/plain_a in/plain_b --out p")[0] == 0
    for name in ("grouped_a", "depth_a"):
        code, _, err = plait(f"merge in/{name} --out g")
        assert code == 3 and "grouped convolution" in err
    assert deltas(Path("p")).keys() == deltas(Path("in/plain_a")).keys()
    for module, delta in deltas(Path("p")).items():
        wanted = deltas(Path("in/plain_a"))[module] + deltas(Path("in/plain_b"))[module]
        assert float((delta - wanted).norm() / wanted.norm()) < 1e-6


# --- 8 bit floats -----------------------------------------------------------------------------------------------------

Q = {"model.layers.0.self_attn.q_proj": (32, 32)}


@pytest.mark.parametrize("kinds", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, torch.float16), (torch.bfloat16, E5M2)])
def test_8_bit_folders_are_read_exactly(kinds, plait, tmp_path):
    folders = [folder_of(tmp_path / f"in/{n}", Q, seed=i) for i, n in enumerate("ab")]
    for folder, kind in zip(folders, kinds, strict=True):
        changed_tensors(folder, lambda t, kind=kind: {k: v.to(kind) for k, v in t.items()})
    wanted = sum((deltas_of_any(f) for f in folders), start=torch.zeros(32, 32, dtype=torch.float64))
    for command in ("merge in/a in/b --out m", "convert in/a --out c", "inspect in/a", "merge in/a --out one"):
        code, _, err = plait(command)
        assert code == 0, err
    assert "float8" in plait("inspect in/" + ("a" if kinds[0].itemsize == 1 else "b"))[1]
    assert float((deltas_of_any(Path("m")) - wanted).norm() / wanted.norm()) < 1e-6
    for folder in ("c", "one"):
        assert torch.equal(deltas_of_any(Path(folder)), deltas_of_any(folders[0]))


def deltas_of_any(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    A, B = (next(v for k, v in tensors.items() if f"lora_{h}" in k).float().double() for h in "AB")
    return config["lora_alpha"] / A.shape[0] * B @ A


def test_8_bit_files_are_read_exactly(plait, tmp_path):
    (tmp_path / "in").mkdir()
    names, sums = ("lora_unet_x_attn1_to_q", "lora_unet_x_attn1_to_k"), {}
    for seed, kind in enumerate((E4M3, E5M2)):
        generator, tensors = torch.Generator().manual_seed(seed), {}
        for name in names:
            A, B = torch.randn(4, 8, generator=generator).to(kind), torch.randn(8, 4, generator=generator).to(kind)
            tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(2.0)}
            sums[name] = sums.get(name, 0) + 0.5 * B.float().double() @ A.float().double()
        save_file(tensors, tmp_path / f"in/{seed}.safetensors", {"ss_network_module": "networks.lora"})
    code, _, err = plait("merge in/0.safetensors in/1.safetensors --out m.safetensors")
    assert code == 0, err
    found = load_file("m.safetensors")
    for name, wanted in sums.items():
        A, B = found[f"{name}.lora_down.weight"].double(), found[f"{name}.lora_up.weight"].double()
        delta = float(found[f"{name}.alpha"]) / A.shape[0] * B @ A
        assert float((delta - wanted).norm() / wanted.norm()) < 1e-6


def test_an_8_bit_nan_is_found(plait, tmp_path):
    folder = folder_of(tmp_path / "in/a", Q)
    changed_tensors(folder, lambda t: {k: (v * float("nan") if "lora_A" in k else v).to(E4M3) for k, v in t.items()})
    code, _, err = plait("merge in/a --out m")
    assert code == 3 and "holds NaN or infinity" in err


def test_the_shared_case_of_8_bit_floats(case, plait):
    case("12_fp8_files")
    commands = ["inspect in/fp8_a.safetensors", "merge in/fp8_a.safetensors in/fp8_b.safetensors --out o.safetensors"]
    commands += ["merge in/e5m2.safetensors in/bf16_c.safetensors --out p.safetensors"]
    for command in [*commands, "inspect in/peft8", "merge in/peft8 --out m", "convert in/peft8 --out c"]:
        code, _, err = plait(command)
        assert code == 0, err


# --- patterns ---------------------------------------------------------------------------------------------------------

PATTERNS = [
    r"^(?:.*\.)?layers\.(?:[0-1])\.(?:self_attn|cross_attn)\.(?:q_proj|v_proj)",
    r"model\.layers\.(0|1)\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|o_proj|up_proj|gate_proj|down_proj)",
    r".*\.layers\.[0-9]+\.(?:self_attn)\.(?:q|k|v|o)_proj$",
    r"(.*\.)?(layers|blocks|h)\.(\d+)\.(self_attn|attn)\.(q_proj|query)",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sound_patterns_are_matched_as_peft_does(pattern, plait, tmp_path):
    more = {"rank_pattern": {pattern: 8}, "alpha_pattern": {pattern: 4}}
    wanted = trained(tmp_path / "in/a", llama(layers=2), **more)
    assert {v.shape[0] for k, v in load_file("in/a/adapter_model.safetensors").items() if "lora_A" in k} & {8}
    code, _, err = plait("merge in/a --out m")
    assert code == 0, err
    assert far(logits(loaded("m", llama(layers=2))), wanted, logits(llama(layers=2))) < 1e-5


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_the_shared_case_of_patterns(name, case, plait):
    from transformers import LlamaConfig, LlamaForCausalLM

    def base():
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        }
        ids = {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, **ids)).eval()

    case("17_rank_pattern_regex")
    assert plait(f"merge in/{name} --out m")[0] == 0
    assert far(logits(loaded("m", base())), torch.load("in/logits.pt")[name], logits(base())) < 1e-5
    assert plait(f"merge in/{name} in/plain --out both")[0] == 0
    summed = base()
    for folder in (f"in/{name}", "in/plain"):
        summed = loaded(folder, summed).merge_and_unload()
    assert far(logits(loaded("both", base())), logits(summed.eval()), logits(base())) < 1e-5


# --- factors that the config leaves out -------------------------------------------------------------------------------

LEFT_OUT = [  # fields of the config, and what of the module's name is left out by them
    ({"target_modules": ["q_proj"]}, "v_proj"),
    ({"target_modules": r".*\.q_proj"}, "v_proj"),
    ({"target_modules": r".*\.(q|v)_proj"}, None),
    ({"exclude_modules": ["v_proj"]}, "v_proj"),
    ({"layers_to_transform": [1]}, "layers.0"),
    ({}, None),
    ({"target_modules": None}, None),
    ({"target_modules": "all-linear"}, None),
]


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # of "all-linear", as of the adapter itself
@pytest.mark.parametrize(("fields", "left_out"), LEFT_OUT)
@pytest.mark.parametrize(
    "command", ["merge in/a", "merge in/a --method tsv", "convert in/a", "merge in/a --bake in/base"]
)
def test_factors_that_peft_passes_over_are_told(fields, left_out, command, plait, tmp_path):
    llama(layers=2).save_pretrained(tmp_path / "in/base")
    trained(tmp_path / "in/a", llama(layers=2))
    changed_config(tmp_path / "in/a", **fields)
    names = deltas(tmp_path / "in/a")
    passed_over = [m for m in names if left_out and left_out in m]
    if passed_over:  # by PEFT itself
        held = dict(loaded(tmp_path / "in/a", llama(layers=2)).named_modules())
        assert [m for m in names if f"base_model.model.{m}.lora_A" not in held] == passed_over
    code, out, err = plait(f"{command} --out m")
    assert code == 0, err
    told = [line for line in out.splitlines() if "PEFT passes over" in line]
    assert len(told) == bool(passed_over)
    assert not told or (min(passed_over) in told[0] and f"{len(passed_over) - 1} module" in told[0])
    if "--bake" not in command:  # what is written is loaded whole
        held = dict(loaded("m", llama(layers=2)).named_modules())
        assert all(f"base_model.model.{m}.lora_A" in held for m in names)


@pytest.mark.parametrize(
    "fields",
    [{"trainable_token_indices": [3, 4]}, {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["up_proj"]}],
)
def test_modules_that_a_conversion_makes_are_not_called_left_out(fields, plait, tmp_path):
    """They come from what the config says of tokens and whole weights, and no config edited by hand passes over them."""
    llama().save_pretrained(tmp_path / "in/base")
    before = trained(tmp_path / "in/a", llama(), **fields)
    code, out, err = plait("convert in/a --base in/base --rank 32 --out m")
    assert code == 0 and "PEFT passes over" not in out + err
    assert far(logits(loaded("m", llama())), before, logits(llama())) < 1e-5


def test_fields_that_no_peft_knows_are_told(plait, tmp_path):
    """One of a later PEFT may change what the factors mean; with this one they are plain LoRA."""
    before = trained(tmp_path / "in/a", llama())
    changed_config(tmp_path / "in/a", use_sines=True, lora_dtype=None, empty={})
    with pytest.warns(UserWarning, match="use_sines"):
        model = loaded(tmp_path / "in/a", llama())
    assert far(logits(model), before, logits(llama())) < 1e-6
    for command in ("merge in/a", "convert in/a"):
        code, out, _ = plait(f"{command} --out {command[:5]}")
        assert code == 0 and "a: adapter_config.json sets use_sines, unknown to PEFT up to 0.21" in out
    assert far(logits(loaded("merge", llama())), before, logits(llama())) < 1e-5
    assert "unknown to PEFT" not in plait("merge merge --out again")[1]
