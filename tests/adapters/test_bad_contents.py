"""Bad configs, tensors and shards of adapter folders: one typed error each, and nothing is touched."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.config import CONFIG
from plait.adapters.lora import Adapter
from plait.adapters.peft_format import WEIGHTS, read_adapter, write_adapter
from plait.adapters.tensor_file import write_tensors
from plait.disk.store import MANIFEST
from plait.errors import InputError
from tests.adapters.conftest import ROOT, Damage, config, refused, tensors, unsealed
from tests.conftest import resealed

# --- config: items 10 to 13, 24 to 28 ---------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[Damage, str]] = {
    "10 not UTF-8": (lambda f: (f / CONFIG).write_bytes(b'{"r": "\xff"}'), "not UTF-8"),
    "11 deep": (lambda f: (f / CONFIG).write_text("[" * 100_000), "not valid JSON"),
    "11 huge": (lambda f: (f / CONFIG).write_text(" " * (17 << 20)), "at most"),
    "11 a list": (lambda f: (f / CONFIG).write_text("[1]"), "not a JSON object"),
    "11 a key twice": (lambda f: (f / CONFIG).write_text('{"r": 1, "r": 2}'), "duplicate key 'r'"),
    **{f"12 alpha {a!r:.20}": (lambda f, a=a: config(f, lora_alpha=a), "lora_alpha is") for a in
       (float("nan"), float("inf"), -1, 0, "16", True, [16], 10**400, 1e300)},
    **{f"13 r {r!r:.20}": (lambda f, r=r: config(f, r=r), "r is") for r in (0, -1, 10**9, 2.0, "2", True)},
    "13 rank_pattern": (lambda f: config(f, rank_pattern={"query": 0}), r"rank_pattern\[query\]"),
    "24 alpha_pattern": (lambda f: config(f, alpha_pattern={"query": "x"}), r"alpha_pattern\[query\]"),
    "24 a pattern that is a list": (lambda f: config(f, rank_pattern=["query"]), "rank_pattern is .*, expected an object"),
    "36 a bad regex": (lambda f: config(f, rank_pattern={"que(ry": 2}), "is not a regex"),
    "36 flags inside": (lambda f: config(f, rank_pattern={"(?i)QUERY": 2}), "is not a regex"),
    "36 a regex of many characters": (lambda f: config(f, alpha_pattern={"query|" * 900: 2}), "characters, at most"),
    "36 keys without end": (lambda f: config(f, rank_pattern={f"{'.*' * 900}{i}": 2 for i in range(99)}), "over 50000"),
    "25 not LoRA": (lambda f: config(f, peft_type="IA3"), "only LORA"),
    "25 what PEFT makes LoRA of": (lambda f: config(f, peft_type="LOKR"), "only LORA .*save_as_lora"),
    "25 a kind that is a list": (lambda f: config(f, peft_type=["LORA"]), "only LORA adapters can be merged"),
    "25 DoRA": (lambda f: config(f, use_dora=True), "DoRA"),
    "25 lora_bias": (lambda f: config(f, lora_bias=True), "lora_bias"),
    "25 bias": (lambda f: config(f, bias="all"), "bias='all'"),
    "25 aLoRA": (lambda f: config(f, alora_invocation_tokens=[1]), "aLoRA"),
    "25 KaSA": (lambda f: config(f, kasa_config={"a": 1}), "KaSA"),
    **{f"25 BD-LoRA {v!r}": (lambda f, v=v: config(f, use_bdlora=v), "BD-LoRA's factors") for v in (True, {"nblocks": 2})},
    "26 PiSSA": (lambda f: config(f, init_lora_weights="pissa_niter_4"), "changed the base weights"),
    "26 OLoRA": (lambda f: config(f, init_lora_weights="OLoRA"), "changed the base weights"),
    "26 LoftQ": (lambda f: config(f, init_lora_weights="loftq"), "changed the base weights"),
    "28 QALoRA": (lambda f: config(f, use_qalora=True), "QALoRA"),
    "29 fused experts": (lambda f: config(f, target_parameters=["query.weight", "query.bias"]), "1 parameter,"),
    "a type that is a list": (lambda f: config(f, task_type=["SEQ_CLS"]), "task_type is .*, expected a text"),
    "a revision that is a number": (lambda f: config(f, revision=5), "revision is 5, expected a text"),
    "a base that is a number": (lambda f: config(f, base_model_name_or_path=5), "base_model_name_or_path"),
    "a base with NUL": (lambda f: config(f, base_model_name_or_path="a\0b"), "without NUL"),
    "a base that is half a surrogate pair": (lambda f: config(f, base_model_name_or_path="\ud800"), "base_model_name"),
    "a base of 5000 characters": (lambda f: config(f, base_model_name_or_path="a" * 5000), "at most 1024 characters"),
    **{f"{key} as {value!r}": (lambda f, key=key, value=value: config(f, **{key: value}), f"{key} is .*, expected true or false")
       for key in ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias") for value in ("false", 0, 1.0, [])},
    "targets of numbers": (lambda f: config(f, target_modules=[1]), "target_modules is .*, expected a list of texts"),
}  # fmt: skip


@pytest.mark.parametrize("damage", CONFIGS)
def test_bad_configs(folder, damage):
    make, message = CONFIGS[damage]
    make(unsealed(folder))
    refused(folder, message, CONFIG)


def test_10_a_byte_order_mark_is_no_damage(folder):
    (unsealed(folder) / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())
    assert read_adapter(folder).rank == 2


# --- tensors: items 16 to 19, 22 to 24, 27, 32 ------------------------------------------------------------------------

A, B = f"{ROOT}query.lora_A.weight", f"{ROOT}query.lora_B.weight"


def filled(found: dict[str, torch.Tensor], value: float) -> None:
    found[A][0, 0] = value


def renamed(prefix: str) -> Damage:
    return lambda f: tensors(f, lambda t: t.update({k.replace("base_model.model.", prefix): t.pop(k) for k in list(t)}))


TENSORS: dict[str, tuple[Damage, str]] = {
    "16 NaN": (lambda f: tensors(f, lambda t: filled(t, float("nan"))), f"{A}.* holds NaN"),
    "16 infinity": (lambda f: tensors(f, lambda t: filled(t, float("-inf"))), f"{A}.* holds NaN or infinity"),
    "17 no B": (lambda f: tensors(f, lambda t: t.pop(B)), r"layer\.query' has no lora_B"),
    "17 none": (lambda f: save_file({"base_model.model.x": torch.ones(1)}, f / WEIGHTS), "none of them called lora_A"),
    "18 A alone": (lambda f: tensors(f, lambda t: t.update({f"{ROOT}key.lora_A.weight": torch.ones(2, 6)})), "key' has no lora_B"),
    "19 another r": (lambda f: config(f, r=3), "factors of rank 2, and adapter_config.json says 3"),
    "19 halves that differ": (lambda f: tensors(f, lambda t: t.update({B: torch.ones(4, 3)})), "no rank in common"),
    "19 no matrix": (lambda f: tensors(f, lambda t: t.update({A: torch.ones(2, 6, 1)})), "expected a floating matrix"),
    "19 integers": (lambda f: tensors(f, lambda t: t.update({A: torch.ones(2, 6, dtype=torch.int64)})), "expected a floating matrix"),
    "19 rank 0": (lambda f: tensors(f, lambda t: t.update({A: torch.ones(0, 6), B: torch.ones(4, 0)})), "is empty"),
    "32 compiled": (renamed("base_model.model._orig_mod."), "_orig_mod"),
    "32 FSDP": (renamed("base_model.model._fsdp_wrapped_module."), "_fsdp_wrapped_module"),
    "32 DDP": (renamed("base_model.model.module."), "module"),
    "32 not PEFT's": (renamed("transformer."), "does not start with"),
}  # fmt: skip


@pytest.mark.parametrize("damage", TENSORS)
def test_bad_tensors(folder, damage):
    make, message = TENSORS[damage]
    make(unsealed(folder))
    refused(folder, message)


def test_24_patterns_and_rslora_scale_as_in_peft(folder):
    config(
        unsealed(folder), use_rslora=True, lora_alpha=6, alpha_pattern={r"layer\.query": 3}, rank_pattern={"value": 2}
    )
    found = read_adapter(folder)
    assert found.modules["layer.query"].scaling == pytest.approx(3 / 2**0.5)
    assert found.modules["layer.value"].scaling == pytest.approx(6 / 2**0.5)


@pytest.mark.parametrize(
    "pattern", [r"([a-z.]+)+x", ".*" * 9 + "x", "a?" * 40 + "a" * 40, "(a|a)" * 40, "(?:a|a)" * 40]
)
def test_36_patterns_that_blow_up_in_a_backtracking_engine_are_matched_all_the_same(folder, pattern):
    config(unsealed(folder), rank_pattern={pattern: 7})
    started = time.monotonic()
    assert read_adapter(folder).rank == 2 and time.monotonic() - started < 5


def test_flags_may_be_null(folder):
    config(
        unsealed(folder), use_rslora=None, fan_in_fan_out=None, use_dora=None, modules_to_save=None, rank_pattern=None
    )
    assert read_adapter(folder).rank == 2


@pytest.mark.parametrize("pattern", [r".*layer\.(query|key)", r"(?:bert\.)?layer\.query", r"layer\.\w+"])
def test_24_patterns_as_people_write_them_are_matched(folder, pattern):
    config(unsealed(folder), alpha_pattern={pattern: 6})
    assert read_adapter(folder).modules["layer.query"].scaling == pytest.approx(3.0)


@pytest.mark.parametrize("task", [5, ["topic"], {"name": "topic"}])
def test_a_recorded_task_that_is_no_name(folder, task):
    resealed(folder, result={"task": task})
    refused(folder, "result.task is .*, expected a text", MANIFEST)


def test_27_a_head_that_holds_nan_is_named(folder, tmp_path):
    adapter = read_adapter(folder)
    merged = Adapter(
        "merged", "some/base", adapter.modules, "FEATURE_EXTRACTION", "", {"topic": dict(adapter.heads["topic"])}
    )
    (tmp_path / "merged").mkdir()
    write_adapter(tmp_path / "merged", merged)
    save_file({"classifier.weight": torch.full((3, 4), float("nan"))}, tmp_path / "merged/heads/topic.safetensors")
    refused(tmp_path / "merged", "holds NaN", "heads/topic.safetensors")
    with pytest.raises(InputError, match="holds NaN") as raised:
        write_tensors(tmp_path / "x.safetensors", {"w": torch.tensor([float("inf")])})
    assert raised.value.where == "w" and not (tmp_path / "x.safetensors").exists()


# --- shards -----------------------------------------------------------------------------------------------------------

INDEXES = {
    "no weight_map": "{}",
    "not a shard in this folder": '{"weight_map": {"x": "../x.safetensors"}}',
    "not a shard in this folder ": '{"weight_map": {"x": "/etc/passwd"}}',
    "no such file": '{"weight_map": {"x": "absent.safetensors"}}',
    "is in no shard": '{"weight_map": {"x": "a.safetensors"}}',
    "is in two shards": '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}',
}


@pytest.mark.parametrize("message", INDEXES)
def test_bad_shards(folder, message):
    (unsealed(folder) / WEIGHTS).rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    (folder / "adapter_model.safetensors.index.json").write_text(INDEXES[message])
    refused(folder, message.strip())


def test_good_shards(folder):
    whole = load_file(unsealed(folder) / WEIGHTS)
    expected = read_adapter(folder)
    (folder / WEIGHTS).unlink()
    parts = {"a.safetensors": list(whole)[:3], "b.safetensors": list(whole)[3:]}
    for name, keys in parts.items():
        save_file({k: whole[k] for k in keys}, folder / name)
    index = {"weight_map": {k: name for name, keys in parts.items() for k in keys}}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    found = read_adapter(folder)
    assert all(
        torch.equal(found.modules[m].A, f.A) and torch.equal(found.modules[m].B, f.B)
        for m, f in expected.modules.items()
    )


def test_what_a_config_does_not_say_is_what_peft_takes_by_default(tmp_path):
    """Rank 8, alpha 8, no scaling by the root, weights as they lie: the defaults of PEFT's own class."""
    from peft import LoraConfig

    from plait.adapters.config import checked_config

    found, wanted = checked_config({"peft_type": "LORA"}, tmp_path / "adapter_config.json"), LoraConfig()
    assert (found.r, found.alpha, found.rslora) == (wanted.r, wanted.lora_alpha, wanted.use_rslora)
    assert found.fan_in_fan_out is wanted.fan_in_fan_out is False
    assert found.weight_tying is wanted.ensure_weight_tying is False
    assert (dict(found.rank_pattern), dict(found.alpha_pattern)) == (wanted.rank_pattern, wanted.alpha_pattern)
    assert found.base == "" and found.revision is found.task_type is found.target_modules is None
    assert found.modules_to_save == found.target_parameters == found.listed == ()
