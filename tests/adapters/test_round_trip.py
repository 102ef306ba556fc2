"""What plait writes is what it reads, and what PEFT reads: to the bit, on every architecture."""

from __future__ import annotations

import json
import struct
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from plait.adapters.config import CONFIG
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import WEIGHTS, read_adapter, write_adapter
from plait.adapters.tensor_file import write_tensors
from plait.adapters.tensors import read_tensors
from plait.disk.store import identity, sha256_file, staged_folder
from plait.model.applied import applied
from plait.model.base import backbone_of, head_state, load_task_model, load_tokenizer
from plait.statistics.moments import ModuleInfo
from plait.subspaces.compute import Subspace
from plait.subspaces.start import initial_adapter
from plait.tasks import Source, Task, collate, encode
from plait.tasks.task import Examples
from tests.tiny import ARCHITECTURES, TARGETS, WORDS

TASK = Task("topic", "classification", Source("none"), ("text",), labels=("c0", "c1", "c2"))


@st.composite
def adapters(draw) -> Adapter:
    """Any adapter plait may hold: mixed ranks, scalings, dtypes, a head or several, a prefix or none."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    modules = {}
    for name in draw(
        st.lists(
            st.sampled_from(["l.0.query", "l.0.value", "l.1.query", "l.1.value", "l.10.query"]), min_size=1, unique=True
        )
    ):
        rank, scaling = draw(st.integers(1, 4)), draw(st.sampled_from([1.0, 2.0, 0.5, 1 / 3, 0.3, 16 / 2**0.5]))
        A = torch.randn(rank, 6, generator=generator).to(dtype)
        modules[name] = LoraFactors(A, torch.randn(5, rank, generator=generator).to(dtype), scaling)
    task_type = draw(st.sampled_from(["SEQ_CLS", "FEATURE_EXTRACTION"]))
    count = draw(st.integers(0, 1)) if task_type == "SEQ_CLS" else draw(st.integers(0, 3))
    heads = {
        ("mine" if task_type == "SEQ_CLS" else f"t{i}"): {"classifier.weight": torch.randn(3, 5, generator=generator)}
        for i in range(count)
    }
    prefix = "bert" if task_type == "SEQ_CLS" else ""
    return Adapter(
        "mine",
        "some/base",
        dict(sorted(modules.items())),
        task_type,
        prefix,
        heads,
        revision=draw(st.sampled_from([None, "main"])),
    )


@settings(max_examples=60)
@given(adapters())
def test_written_and_read_again(adapter):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "mine"
        with staged_folder(folder, identity("merge", {})) as stage:
            write_adapter(stage, adapter)
        found = read_adapter(folder)
        twice = Path(name) / "again"
        twice.mkdir()
        write_adapter(twice, found)
        assert (twice / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
        assert json.loads((twice / CONFIG).read_text()) == json.loads((folder / CONFIG).read_text())
    assert list(found.modules) == list(adapter.modules) and found.prefix == adapter.prefix
    for module, factors in adapter.modules.items():
        again = found.modules[module]
        assert torch.equal(again.A, factors.A) and again.A.dtype == factors.A.dtype
        wanted = factors.delta(torch.float64)
        tight = 1e-6 * float(wanted.abs().max().clamp(min=1))  # a folded scaling is rounded once, entries may cancel
        torch.testing.assert_close(again.delta(torch.float64), wanted, rtol=0, atol=tight)
    assert {t: {k: v.tolist() for k, v in h.items()} for t, h in found.heads.items()} == {
        t: {k: v.tolist() for k, v in h.items()} for t, h in adapter.heads.items()
    }


def starting(base, architecture: str, *, zero: bool) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """An adapter on an architecture's usual targets, from given subspaces; with `zero` as it starts, else with a random B."""
    backbone, prefix = backbone_of(load_task_model(base, TASK, seed=0))
    generator = torch.Generator().manual_seed(1)
    subspaces, infos = {}, {}
    for name, module in backbone.named_modules():
        if name.endswith(TARGETS[architecture]) and hasattr(module, "weight"):
            shape = tuple(module.weight.shape[::-1] if architecture == "gpt2" else module.weight.shape)
            basis = torch.linalg.qr(torch.randn(shape[1], 3, generator=generator))[0].T.contiguous()
            subspaces[name] = Subspace(basis, torch.ones(3), 1.0, "given")
            infos[name] = ModuleInfo(name, shape, 1.0, architecture == "gpt2")
    adapter = initial_adapter(
        TASK.name,
        base.name,
        subspaces,
        infos,
        alpha=6.0,
        task_type="SEQ_CLS",
        prefix=prefix,
        target_modules=TARGETS[architecture],
    )
    if not zero:
        for factors in adapter.modules.values():
            factors.B.normal_(0, 0.3, generator=generator)
        adapter = replace(adapter, heads={TASK.name: head_state(load_task_model(base, TASK, seed=0))})
    return adapter, {name: s.A for name, s in subspaces.items()}


def some_batch(base) -> dict[str, torch.Tensor]:
    tokenizer = load_tokenizer(base)
    texts = tuple((" ".join(WORDS[i : i + n]),) for i, n in enumerate((3, 9, 1, 6)))
    rows = encode(tokenizer, TASK, Examples(texts, torch.zeros(4, dtype=torch.int64).numpy()), 16)
    return {k: v for k, v in collate(tokenizer, rows).items() if k != "labels"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_peft_starts_from_the_subspace_and_changes_no_logit(tiny_base, tmp_path, architecture):
    from peft import PeftModel

    base = tiny_base(architecture)
    adapter, subspaces = starting(base, architecture, zero=True)
    write_adapter(tmp_path, adapter)
    model, batch = load_task_model(base, TASK, seed=0), some_batch(base)
    expected = model(**batch).logits
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("error")  # no key of ours, no missing tensor that PEFT would warn of
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        wrapped = PeftModel.from_pretrained(model, str(tmp_path), is_trainable=True).eval()
    assert torch.equal(wrapped(**batch).logits, expected)
    state = {k: v for k, v in wrapped.state_dict().items() if "lora_A" in k}
    assert len(state) == len(subspaces)
    for name, A in subspaces.items():
        assert torch.equal(next(v for k, v in state.items() if f".{name}." in k or k.startswith(f"{name}.")), A)
    assert any(p.requires_grad for n, p in wrapped.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_peft_and_plait_compute_the_same(tiny_base, tmp_path, architecture):
    from peft import PeftModel

    base = tiny_base(architecture)
    adapter, _ = starting(base, architecture, zero=False)
    write_adapter(tmp_path, adapter)
    model, batch = load_task_model(base, TASK, seed=0), some_batch(base)
    bare = model(**batch).logits
    with applied(model, read_adapter(tmp_path, name="topic")):
        ours = model(**batch).logits
    with torch.inference_mode(False):
        wrapped = PeftModel.from_pretrained(load_task_model(base, TASK, seed=0), str(tmp_path)).eval()
    theirs = wrapped(**batch).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert float((ours - bare).abs().max()) > 1e-2


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("pattern", [False, True])
def test_what_peft_saves_is_read(tiny_base, tmp_path, architecture, pattern):
    from peft import LoraConfig, get_peft_model

    base = tiny_base(architecture)
    target = list(TARGETS[architecture])
    ranks = {"rank_pattern": {target[0]: 5}, "alpha_pattern": {target[0]: 3}} if pattern else {}
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        lora_alpha=7,
        target_modules=target,
        use_rslora=True,
        fan_in_fan_out=architecture == "gpt2",
        **ranks,
    )
    model, batch = load_task_model(base, TASK, seed=0), some_batch(base)
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
        expected = wrapped(**batch).logits
    wrapped.save_pretrained(tmp_path / "topic")
    adapter = read_adapter(tmp_path / "topic")
    assert adapter.heads["topic"] and adapter.rank == (5 if pattern else 2)
    bare = load_task_model(base, TASK, seed=0)
    with torch.inference_mode(), applied(bare, adapter):
        torch.testing.assert_close(bare(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ranks", "scalings"), [((2, 2, 2), (1.0, 2.0, 2.0)), ((3, 2, 2), (1.0, 1.0, 1.0))])
def test_a_name_that_ends_in_another_s_keeps_its_own_rank_and_alpha(tmp_path, ranks, scalings):
    """PEFT's patterns fit every name that ends in them: what is the default is written too where it would be taken for another."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    names = ("q", "deep.k", "deep.q")
    modules = {
        n: LoraFactors(torch.randn(r, 4), torch.randn(4, r), s) for n, r, s in zip(names, ranks, scalings, strict=True)
    }
    write_adapter(tmp_path, Adapter("a", "base", modules))
    config = LoraConfig.from_pretrained(tmp_path)
    for name, f in read_adapter(tmp_path).modules.items():
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        assert (rank, alpha / rank) == (f.rank, f.scaling) == (modules[name].rank, modules[name].scaling)


# --- the file itself --------------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


def test_a_file_has_the_bytes_the_library_writes(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(2), "µ": torch.randn(()), "none": torch.zeros(0, 4)}
    write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_every_type_goes_and_comes(tmp_path):
    tensors = {str(d): (torch.randn(3, 3) * 3).to(d) for d in DTYPES} | {"turned": torch.randn(4, 2).T}
    write_tensors(tmp_path / "x", tensors, {"k": "v"})
    read, metadata, digest = read_tensors(tmp_path / "x", finite=True)
    library = load_file(tmp_path / "x")
    assert metadata == {"format": "pt", "k": "v"} and digest == sha256_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor) and torch.equal(library[name], tensor)


def test_tensors_that_start_anywhere_are_read(tmp_path):
    """Writers other than the library need not put wide types first."""
    parts = {
        "byte": torch.ones(1, dtype=torch.uint8),
        "half": torch.full((2,), 2.0, dtype=torch.bfloat16),
        "wide": torch.ones(2),
    }
    names = {"byte": "U8", "half": "BF16", "wide": "F32"}
    data, header = b"", {}
    for name, tensor in parts.items():
        raw = tensor.view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": names[name],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + data)
    read = read_tensors(tmp_path / "x", finite=True)[0]
    assert list(read) == list(parts) and all(torch.equal(read[n], parts[n]) for n in parts)


def test_a_folder_that_is_not_there_is_made(tmp_path):
    factors = {"layers.0.q": LoraFactors(torch.ones(2, 4), torch.ones(3, 2))}
    write_adapter(str(tmp_path / "new" / "one"), Adapter("one", "base", factors))
    assert torch.equal(read_adapter(tmp_path / "new" / "one").modules["layers.0.q"].A, factors["layers.0.q"].A)


def test_an_adapter_is_shown_by_its_sizes():
    factors = LoraFactors(torch.ones(2, 4), torch.ones(3, 2), 0.5)
    one = Adapter("one", "base", {"layers.0.q": factors}, heads={"topic": {"weight": torch.ones(1000)}})
    assert repr(one) == "Adapter('one', base='base', rank=2, 1 module, heads=['topic'])"
    assert (
        repr(replace(factors, kind="embedding")) == "LoraFactors(rank=2, shape=(3, 4), scaling=0.5, kind='embedding')"
    )
